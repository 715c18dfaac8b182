"""The two ways to answer one Generation, folds of the same deltas: piece by piece, or whole.

Every stream ends with exactly one finish_reason per choice, then the usage if asked for, then [DONE]; or, if something
fails after the headers are out, with an error event and [DONE]. Never in silence.
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

    def whole(self, outputs: list[SampleOutput]) -> dict[str, Any]:
        """The answer in one piece."""
        ...


def usage_dict(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
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
        return sse.EventStream(frames, generation, state.config.write_timeout)
    with generation:
        generation.start()
        outputs = await while_connected(request.receive, _collect(generation))
        return Response(msgspec.json.encode(wire.whole(outputs)), media_type=errors.JSON)


async def _collect(generation: Generation) -> list[SampleOutput]:
    outputs = [SampleOutput(index) for index in range(generation.num_choices)]
    async with aclosing(generation.deltas()) as batches:
        async for batch in batches:
            for delta in batch:
                outputs[delta.index].add(delta)
    return outputs


async def _frames(
    generation: Generation, wire: Wire, metrics: Metrics, *, usage_at_end: bool, usage_always: bool
) -> AsyncGenerator[bytes]:
    try:
        async with aclosing(generation.deltas()) as batches:
            async for batch in batches:
                if not batch:
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
                    yield b"".join([sse.event(piece) for piece in pieces])
        if usage_at_end:
            yield sse.event(wire.usage_piece())
    except errors.ApiError as error:
        metrics.error(error.status, error.code)
        yield sse.event(error.body())
    yield sse.DONE
