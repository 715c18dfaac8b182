"""To answer one Generation in blocks, piece by piece or whole: folds of the same deltas by the same code.

Every stream ends with exactly one event that says how, be it an error. What fails before the first event is a plain
HTTP error, as of a whole answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import Response

from ..engine.outputs import Delta
from . import errors, sse
from .blocks import Block, Blocks, Change
from .connection import while_connected
from .generate import Generation
from .json_answer import json_answer
from .metrics import Metrics
from .parsing.reading import Reading
from .state import State

Event = dict[str, Any]  # its `type` is the name of its frame


class Ending(NamedTuple):
    """How a sample ended, as in Delta."""

    finish_reason: str
    stop_reason: str | int | None

    @property
    def is_cut(self) -> bool:
        """Not by itself: there would have been more."""
        return self.finish_reason not in ("stop", "tool_calls")


class BlockWire(Protocol):
    """How one API spells an answer in blocks."""

    keep_alive: bytes  # a frame that says nothing

    def begin(self) -> list[Event]:
        """What a stream starts with."""
        ...

    def change(self, change: Change) -> list[Event]: ...

    def end(self, row: list[Block], ending: Ending) -> list[Event]:
        """What a stream ends with; the last block has been closed."""
        ...

    def fail(self, row: list[Block], error: errors.ApiError) -> list[Event]:
        """What a stream that has begun ends with when there is nothing more to come; the last block is cut."""
        ...

    def whole(self, row: list[Block], ending: Ending) -> dict[str, Any]:
        """The answer in one piece."""
        ...


async def answer_in_blocks(
    request: Request, state: State, generation: Generation, wire: BlockWire, *, stream: bool
) -> Response:
    """Start `generation`, which is closed when the answer is complete or nobody waits for it any more."""
    if stream:
        try:
            generation.start()
        except BaseException:
            generation.close()
            raise
        return sse.EventStream(_frames(generation, wire, state.metrics), generation)
    with generation:
        generation.start()
        content = await while_connected(request.receive, _whole(generation, wire))
        return json_answer(content)


class _Fold:
    """From the deltas of a sample to its blocks."""

    def __init__(self, generation: Generation) -> None:
        self.blocks = Blocks()
        self.ending: Ending | None = None
        self._usage = generation.usage
        self._usage.reasoning_tokens = 0
        (prompt,) = generation.request.prompts
        self._reading = Reading(generation.request.format, tells_tokens=prompt.params.logprobs is not None)

    def add(self, delta: Delta) -> list[Change]:
        pieces = self._reading.pieces(delta)
        changes = self.blocks.add(pieces, self._reading.said)
        self._usage.reasoning_tokens = self._reading.reasoning_tokens
        if delta.finish_reason is not None:
            self.ending = Ending(delta.finish_reason, delta.stop_reason)
            changes += self.blocks.end(is_cut=self.ending.is_cut)
        return changes


async def _whole(generation: Generation, wire: BlockWire) -> dict[str, Any]:
    fold = _Fold(generation)
    async with aclosing(generation.deltas()) as batches:
        async for batch in batches:
            for delta in batch:
                fold.add(delta)
    if fold.ending is None:
        raise errors.engine_failed()
    return wire.whole(fold.blocks.row, fold.ending)


async def _frames(generation: Generation, wire: BlockWire, metrics: Metrics) -> AsyncGenerator[bytes]:
    fold = _Fold(generation)
    begun = False
    try:
        async with aclosing(generation.deltas()) as batches:
            async for batch in batches:
                news = [delta for delta in batch if not delta.is_empty]
                if batch and not news:
                    continue
                events = [] if begun else wire.begin()
                begun = True
                events += [event for delta in news for change in fold.add(delta) for event in wire.change(change)]
                if fold.ending is not None:
                    events += wire.end(fold.blocks.row, fold.ending)
                frame = b"".join([sse.named_event(event) for event in events])
                if not batch:
                    frame += wire.keep_alive
                if frame:
                    yield frame
    except errors.ApiError as error:
        if not begun:
            raise
        metrics.error(error.status, error.code)
        row = fold.blocks.row
        if row:
            row[-1].is_cut = True
        yield b"".join([sse.named_event(event) for event in wire.fail(row, error)])
