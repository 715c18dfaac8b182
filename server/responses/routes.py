"""POST /v1/responses: a conversation in items in, the next items out. Nothing is kept."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..as_chat import open_chat, respelled
from ..block_answer import answer_in_blocks
from ..generate import GenerateRequest
from ..inputs import Order, chat_request
from ..protocol import ChatBody
from ..routing import GuardedRoute
from ..state import state_of
from .body import NAMES, ROUTE, ResponsesBody
from .truncation import longest_that_fits
from .wire import ResponsesWire

router = APIRouter(route_class=GuardedRoute)


@router.post(ROUTE, response_model=None)
async def create_response(body: ResponsesBody, request: Request) -> Response:
    state = state_of(request)
    model = state.model_name(body.model)
    chat = body.chat()

    def prepare(chat: ChatBody, order: Order) -> GenerateRequest:
        if body.truncation != "auto":
            return chat_request(chat, state.text, order)
        return longest_that_fits(
            chat.messages,
            lambda messages: chat_request(chat.model_copy(update={"messages": messages}), state.text, order),
        )

    with respelled(NAMES):
        generation = await open_chat(request, state, chat, prepare)
    label = chat.request_id or request.state.request_id
    wire = ResponsesWire(generation, body, state.text.tokenizer, model, label)
    return await answer_in_blocks(request, state, generation, wire, stream=bool(body.stream))
