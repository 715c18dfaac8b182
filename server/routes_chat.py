"""POST /v1/chat/completions: a conversation in, the next message out."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..engine.outputs import Delta, SampleOutput
from ..engine.tokenizer import Tokenizer
from .generate import Generation
from .inputs import chat_request, chat_size
from .logprobs import chat_logprobs, prompt_logprobs
from .protocol import ChatBody
from .respond import respond, usage_dict
from .routing import GuardedRoute
from .state import state_of

router = APIRouter(route_class=GuardedRoute)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    state = state_of(request)
    model = state.model_name(body.model)
    body.check_together(state.text.limits)
    order = state.order_of(request, body)
    generation = await state.open_generation(chat_size(body), order, lambda: chat_request(body, state.text, order))
    wire = ChatWire(generation, body, state.text.tokenizer, model, body.request_id or request.state.request_id)
    return await respond(request, state, body, generation, wire)


class ChatWire:
    """The spelling of /v1/chat/completions."""

    def __init__(self, generation: Generation, body: ChatBody, tokenizer: Tokenizer, model: str, label: str) -> None:
        self._generation = generation
        self._body = body
        self._tokenizer = tokenizer
        self._id = f"chatcmpl-{label}"
        self._head = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._begun: set[int] = set()

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        pieces = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            opening = self._piece(delta.index, {"role": "assistant", "content": ""})
            if self._body.return_token_ids and len(self._begun) == 1:
                opening["prompt_token_ids"] = self._generation.request.prompts[0].token_ids
            pieces.append(opening)
        if delta.text or delta.token_ids:
            piece = self._piece(delta.index, {"content": delta.text})
            (choice,) = piece["choices"]
            self._add_details(choice, delta)
            pieces.append(piece)
        if delta.finish_reason is not None:
            if not (delta.text or delta.token_ids):
                pieces.append(self._piece(delta.index, {}))
            (choice,) = pieces[-1]["choices"]
            choice["finish_reason"] = delta.finish_reason
            choice["stop_reason"] = delta.stop_reason
        return pieces

    def usage_piece(self) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage_dict(self._generation.usage)}

    def choice(self, output: SampleOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        self._add_details(choice, output)
        return choice

    def whole(self, choices: list[msgspec.Raw]) -> dict[str, Any]:
        answer = {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_dict(self._generation.usage),
        }
        prompt, stream = self._generation.part_of(0)
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self._tokenizer, stream.prompt_logprobs or [])
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = prompt.token_ids
        return answer

    def _piece(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}

    def _add_details(self, choice: dict[str, Any], news: Delta | SampleOutput) -> None:
        num_top = self._body.num_logprobs
        if num_top is not None:
            choice["logprobs"] = chat_logprobs(self._tokenizer, news.logprobs or [], num_top)
        if self._body.return_token_ids:
            choice["token_ids"] = news.token_ids
