"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shape."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..as_chat import open_chat, respelled
from ..block_answer import answer_in_blocks
from ..inputs import chat_prompt, chat_request
from ..json_answer import json_answer
from ..routing import GuardedRoute
from ..state import state_of
from .body import ROUTE, MessagesBody, PromptBody
from .wire import MessagesWire

router = APIRouter(route_class=GuardedRoute)


@router.post(ROUTE, response_model=None)
async def create_message(body: MessagesBody, request: Request) -> Response:
    state = state_of(request)
    model = state.model_name(body.model)
    chat = body.chat(state.text)
    with respelled(body.names):
        generation = await open_chat(request, state, chat, lambda chat, order: chat_request(chat, state.text, order))
    wire = MessagesWire(generation, model, chat.request_id or request.state.request_id)
    return await answer_in_blocks(request, state, generation, wire, stream=bool(body.stream))


@router.post(f"{ROUTE}/count_tokens", response_model=None)
async def count_tokens(body: PromptBody, request: Request) -> Response:
    """What the prompt of the same request to /v1/messages would have."""
    state = state_of(request)
    state.model_name(body.model)
    chat = body.chat(state.text)
    with respelled(body.names):
        chat.refuse_unbuilt()
        ids = await state.in_pool(lambda: chat_prompt(chat, state.text))
    return json_answer({"input_tokens": len(ids)})
