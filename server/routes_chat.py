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
from .as_chat import respelled
from .functions import NAMES, as_tools, asks_for_functions, old_delta, old_finish
from .generate import Generation
from .inputs import chat_request, chat_size
from .logprobs import chat_logprobs, prompt_logprobs, speller
from .parsing.pieces import CallArguments, CallBegin, Piece, Reasoning
from .parsing.reading import Message, Reading
from .protocol import ChatBody
from .respond import respond, usage_dict
from .routing import GuardedRoute
from .state import state_of

router = APIRouter(route_class=GuardedRoute)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    state = state_of(request)
    model = state.model_name(body.model)
    chat = as_tools(body)
    chat.check_together(state.text.limits)
    order = state.order_of(request, chat)
    with respelled(NAMES if asks_for_functions(body) else {}):
        generation = await state.open_generation(chat_size(chat), order, lambda: chat_request(chat, state.text, order))
    wire = ChatWire(generation, chat, state.text.tokenizer, model, body.request_id or request.state.request_id)
    return await respond(request, state, body, generation, wire)


class ChatWire:
    """The spelling of /v1/chat/completions."""

    def __init__(self, generation: Generation, body: ChatBody, tokenizer: Tokenizer, model: str, label: str) -> None:
        self._generation = generation
        self._body = body
        self._tokenizer = tokenizer
        self._spell = speller(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._echoed = body.echoed
        self._id = f"chatcmpl-{label}"
        self._head = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._begun: set[int] = set()
        self._is_old = asks_for_functions(body)
        self._shows_tokens = body.num_logprobs is not None or bool(body.return_token_ids)
        self._reading = Reading(generation.request.format)
        generation.usage.reasoning_tokens = 0

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """One event for each piece that the delta brings; the first carries its log-probabilities and ids.

        Where text is held back, because it may become markup, its tokens do not wait with it: an event with empty
        content carries them, if the caller asked for any such detail.
        """
        events = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            opening = self._piece(delta.index, {"role": "assistant", "content": ""})
            if self._body.return_token_ids and len(self._begun) == 1:
                opening["prompt_token_ids"] = self._generation.request.prompts[0].token_ids
            if self._body.return_prompt_text and len(self._begun) == 1:
                opening["prompt_text"] = self._prompt_text()
            events.append(opening)
            if self._echoed:
                events.append(self._piece(delta.index, {"content": self._echoed}))
        spelled = [self._named(_spelled(piece)) for piece in self._reading.pieces(delta)]
        self._generation.usage.reasoning_tokens = self._reading.reasoning_tokens
        if not spelled and delta.token_ids and (self._shows_tokens or delta.finish_reason is not None):
            spelled = [{"content": ""}]
        news = [self._piece(delta.index, piece) for piece in spelled]
        if news:
            (choice,) = news[0]["choices"]
            self._add_details(choice, delta)
        if delta.finish_reason is not None:
            if not news:
                news.append(self._piece(delta.index, {}))
            (choice,) = news[-1]["choices"]
            choice["finish_reason"] = self._finish(delta.finish_reason)
            choice["stop_reason"] = delta.stop_reason
        return events + news

    def usage_piece(self) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage_dict(self._generation.usage)}

    def choice(self, output: SampleOutput) -> dict[str, Any]:
        message = self._reading.message(output)
        self._generation.usage.reasoning_tokens = self._reading.reasoning_tokens
        choice: dict[str, Any] = {
            "index": output.index,
            "message": self._named(_whole_message(message, self._echoed)),
            "logprobs": None,
            "finish_reason": self._finish(message.finish_reason),
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
        if self._body.return_prompt_text:
            answer["prompt_text"] = self._prompt_text()
        return answer

    def _named(self, delta: dict[str, Any]) -> dict[str, Any]:
        return old_delta(delta) if self._is_old else delta

    def _finish(self, reason: str | None) -> str | None:
        return old_finish(reason) if self._is_old else reason

    def _prompt_text(self) -> str:
        """What the model read, special tokens and all."""
        return self._tokenizer.decode(self._generation.request.prompts[0].token_ids, skip_special_tokens=False)

    def _piece(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}

    def _add_details(self, choice: dict[str, Any], news: Delta | SampleOutput) -> None:
        if self._body.num_logprobs is not None:
            choice["logprobs"] = chat_logprobs(self._tokenizer, self._spell, news.logprobs or [])
        if self._body.return_token_ids:
            choice["token_ids"] = news.token_ids


def _spelled(piece: Piece) -> dict[str, Any]:
    """A piece as the `delta` of an event. Thinking has two names, since clients know one or the other."""
    if isinstance(piece, Reasoning):
        return {"reasoning": piece.text, "reasoning_content": piece.text}
    if isinstance(piece, CallBegin):
        function = {"name": piece.name, "arguments": ""}
        return {"tool_calls": [{"index": piece.call, "id": piece.id, "type": "function", "function": function}]}
    if isinstance(piece, CallArguments):
        return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}
    return {"content": piece.text}


def _whole_message(message: Message, echoed: str) -> dict[str, Any]:
    """Content is null beside calls, if there is no text. echoed: what it begins with."""
    spelled: dict[str, Any] = {
        "role": "assistant",
        "content": echoed + message.content or (None if message.calls else ""),
        "refusal": None,
    }
    if message.reasoning:
        spelled["reasoning"] = spelled["reasoning_content"] = message.reasoning
    if message.calls:
        spelled["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    return spelled
