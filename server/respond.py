"""The two ways to answer one Generation, folds of the same deltas: piece by piece, or whole.

Every stream ends with exactly one finish_reason per choice, then the usage if asked for, then [DONE]; or, if something
fails after its first event, with an error event and [DONE]. Never in silence. What fails before the first event is a
plain HTTP error, as of a whole answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..engine.outputs import Delta, SampleOutput
from . import errors, sse
from .connection import while_connected
from .generate import Generation, Usage
from .json_answer import json_answer
from .metrics import Metrics
from .protocol import GenerateBody
from .state import State


class Wire(Protocol):
    """How one API spells its answers."""

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """The events of one delta."""
        ...

    def usage_piece(self) -> dict[str, Any]:
        """The event that carries the usage alone: no choices."""
        ...

    def choice(self, output: SampleOutput) -> dict[str, Any]:
        """One sample that has ended, as the whole answer shows it."""
        ...

    def whole(self, choices: list[msgspec.Raw]) -> dict[str, Any]:
        """The answer in one piece, of encoded choices in their order."""
        ...


def usage_dict(usage: Usage) -> dict[str, Any]:
    thinking = {} if usage.reasoning_tokens is None else {"reasoning_tokens": usage.reasoning_tokens}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.drafted_tokens - usage.accepted_tokens,
            **thinking,
        },
    }


async def respond(request: Request, state: State, body: GenerateBody, generation: Generation, wire: Wire) -> Response:
    """Start `generation`, which is closed when the answer is complete or nobody waits for it any more."""
    if body.stream:
        try:
            generation.start()
        except BaseException:
            generation.close()
            raise
        options = body.stream_options
        frames = _frames(
            generation,
            wire,
            state.metrics,
            usage_at_end=bool(options and options.include_usage),
            usage_always=bool(options and options.continuous_usage_stats),
        )
        return sse.EventStream(frames, generation)
    with generation:
        generation.start()
        choices = await while_connected(request.receive, _collect(generation, wire))
        return json_answer(wire.whole(choices))


async def _collect(generation: Generation, wire: Wire) -> list[msgspec.Raw]:
    """A sample is spelled out as soon as it ends, so that of thousands only what the answer says is kept."""
    outputs: dict[int, SampleOutput] = {}
    choices: dict[int, msgspec.Raw] = {}
    async with aclosing(generation.deltas()) as batches:
        async for batch in batches:
            for delta in batch:
                output = outputs.get(delta.index) or outputs.setdefault(delta.index, SampleOutput(delta.index))
                output.add(delta)
                if delta.finish_reason is not None:
                    choices[delta.index] = msgspec.Raw(msgspec.json.encode(wire.choice(outputs.pop(delta.index))))
    return [choices[index] for index in sorted(choices)]


async def _frames(
    generation: Generation, wire: Wire, metrics: Metrics, *, usage_at_end: bool, usage_always: bool
) -> AsyncGenerator[bytes]:
    begun = False
    try:
        async with aclosing(generation.deltas()) as batches:
            async for batch in batches:
                if not batch:
                    begun = True
                    yield sse.KEEP_ALIVE
                    continue
                pieces = [piece for delta in batch if not delta.is_empty for piece in wire.pieces(delta)]
                if usage_always:
                    usage = usage_dict(generation.usage)
                    for piece in pieces:
                        piece["usage"] = usage
                elif usage_at_end:
                    for piece in pieces:
                        piece["usage"] = None
                if pieces:
                    begun = True
                    yield b"".join([sse.event(piece) for piece in pieces])
        if usage_at_end:
            yield sse.event(wire.usage_piece())
    except errors.ApiError as error:
        if not begun:
            raise
        metrics.error(error.status, error.code)
        yield sse.event(error.body())
    yield sse.DONE
