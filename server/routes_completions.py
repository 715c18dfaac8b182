"""POST /v1/completions: text or token ids in, their continuation out."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..engine.outputs import Delta, RequestStream, SampleOutput, SampleStream, TextOptions
from ..engine.tokenizer import Tokenizer
from ..scheduler.plan import Chunk, TokenLogprob
from .generate import Generation, Prompt
from .inputs import completion_request, completion_size
from .logprobs import completion_logprobs, prompt_logprobs, speller
from .protocol import CompletionBody
from .respond import respond, usage_dict
from .routing import GuardedRoute
from .state import state_of

router = APIRouter(route_class=GuardedRoute)


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionBody, request: Request) -> Response:
    state = state_of(request)
    model = state.model_name(body.model)
    body.check_together(state.text.limits)
    order = state.order_of(request, body)
    generation = await state.open_generation(
        completion_size(body, state.text.limits), order, lambda: completion_request(body, state.text, order)
    )
    wire = CompletionWire(generation, body, state.text.tokenizer, model, body.request_id or request.state.request_id)
    return await respond(request, state, body, generation, wire)


class CompletionWire:
    """The spelling of /v1/completions."""

    def __init__(
        self, generation: Generation, body: CompletionBody, tokenizer: Tokenizer, model: str, label: str
    ) -> None:
        self._generation = generation
        self._body = body
        self._tokenizer = tokenizer
        self._spell = speller(tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._head = {
            "id": f"cmpl-{label}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._begun: dict[int, int] = {}  # choice -> characters before its first drawn one

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        choice = self._choice(delta)
        return [{**self._head, "choices": [choice]}]

    def usage_piece(self) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage_dict(self._generation.usage)}

    def choice(self, output: SampleOutput) -> dict[str, Any]:
        choice = self._choice(output)
        if self._body.prompt_logprobs is not None:
            _, stream = self._generation.part_of(output.index)
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, stream.prompt_logprobs or [])
        return choice

    def whole(self, choices: list[msgspec.Raw]) -> dict[str, Any]:
        return {**self._head, "choices": choices, "usage": usage_dict(self._generation.usage)}

    def _choice(self, news: Delta | SampleOutput) -> dict[str, Any]:
        """What is new of one choice, opened by its echoed prompt the first time."""
        text, token_ids = news.text, news.token_ids
        begins = news.index not in self._begun
        logprobs: list[TokenLogprob | None] = list(news.logprobs or ())
        shift = self._begun.setdefault(news.index, 0)
        offsets = [offset + shift for offset in news.offsets]
        shown_ids = token_ids
        choice: dict[str, Any] = {"index": news.index, "text": text}
        if begins:
            prompt, stream = self._generation.part_of(news.index)
            if self._body.echo:
                echo = _echo(prompt, stream, self._tokenizer, self._generation.request.text_options)
                self._begun[news.index] = len(echo.text)
                choice["text"] = echo.text + text
                shown_ids = echo.token_ids + token_ids
                offsets = echo.offsets + [offset + len(echo.text) for offset in offsets]
                logprobs = [None, *(stream.prompt_logprobs or ()), *logprobs]
            if self._body.return_token_ids:
                choice["prompt_token_ids"] = prompt.token_ids
            if self._body.return_prompt_text:
                choice["prompt_text"] = self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
        if self._body.return_token_ids:
            choice["token_ids"] = token_ids
        choice["logprobs"] = (
            None if self._body.num_logprobs is None else completion_logprobs(self._spell, shown_ids, offsets, logprobs)
        )
        choice["finish_reason"] = news.finish_reason
        choice["stop_reason"] = news.stop_reason
        return choice


def _echo(prompt: Prompt, stream: RequestStream, tokenizer: Tokenizer, options: TextOptions) -> Delta:
    """The prompt as if it had been drawn: its text, and where in it each token starts."""
    shown = TextOptions(
        skip_special_tokens=options.skip_special_tokens,
        spaces_between_special_tokens=options.spaces_between_special_tokens,
    )
    said = Chunk("", 0, prompt.token_ids, finish_reason="length")
    echo = SampleStream(tokenizer, shown, opens_document=True).fold(said)
    if prompt.text is not None:
        echo.text = prompt.text
    return echo
