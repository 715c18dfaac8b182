"""What a request comes to, without running it: its token ids, the text that they are, and how it would be drawn.

The very functions that prepare a request for the engine are used, so what they refuse is refused here as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .as_chat import respelled
from .functions import NAMES, as_tools, asks_for_functions
from .generate import GenerateRequest
from .inputs import Order, chat_request, completion_request, completion_size
from .json_answer import json_answer
from .protocol import ChatBody, CompletionBody, GenerateBody
from .routing import GuardedRoute
from .state import State, state_of

router = APIRouter(route_class=GuardedRoute)


@router.post("/v1/completions/render", response_model=None)
async def render_completion(body: CompletionBody, request: Request) -> Response:
    """A list: one object for each prompt."""
    state = state_of(request)
    completion_size(body, state.text.limits)  # refuses what is too much
    order = _check(state, body, request)
    rendered = await _rendered(state, lambda: completion_request(body, state.text, order))
    return await state.in_pool(lambda: json_answer(rendered))  # parameters once for each prompt: millions of ids


@router.post("/v1/chat/completions/render", response_model=None)
async def render_chat_completion(body: ChatBody, request: Request) -> Response:
    """One object."""
    state = state_of(request)
    chat = as_tools(body)
    order = _check(state, chat, request)
    with respelled(NAMES if asks_for_functions(body) else {}):
        (rendered,) = await _rendered(state, lambda: chat_request(chat, state.text, order))
    return json_answer(rendered)


def _check(state: State, body: GenerateBody, request: Request) -> Order:
    state.model_name(body.model)
    body.check_together(state.text.limits)
    return state.order_of(request, body)


async def _rendered(state: State, prepare: Callable[[], GenerateRequest]) -> list[dict[str, Any]]:
    tokenizer = state.text.tokenizer

    def render() -> list[dict[str, Any]]:
        return [
            {
                "prompt": tokenizer.decode(prompt.token_ids, skip_special_tokens=False),
                "token_ids": prompt.token_ids,
                "sampling_params": prompt.params,
            }
            for prompt in prepare().prompts
        ]

    return await state.in_pool(render)
