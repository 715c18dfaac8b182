"""Requests that wait for their grammars, which are compiled beside the engine's loop.

hold(AddRequest) ──a thread compiles──▶ ready() ──▶ the scheduler         abort(): as if it waited there already
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

from ..scheduler.plan import Chunk
from .errors import QuireError
from .grammar import Grammars
from .messages import AddRequest

log = logging.getLogger(__name__)


class Ready(NamedTuple):
    """aborted: samples that were ended meanwhile; error: why the grammar cannot be had."""

    message: AddRequest
    aborted: list[int]
    error: str | None


class _Held(NamedTuple):
    message: AddRequest
    compiled: Future[object]
    aborted: list[int]


class Compiling:
    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def wait(self, seconds: float) -> None:
        """Until one of them need not wait any longer, or so long; not at all where nobody waits."""
        if self._held:
            wait([held.compiled for held in self._held.values()], seconds, FIRST_COMPLETED)

    def hold(self, message: AddRequest) -> bool:
        """Whether the request has to wait; it is kept here then."""
        grammar = message.params.grammar
        if grammar is None or grammar in self._grammars:
            return False
        self._held[message.request_id] = _Held(message, self._grammars.prepare(grammar), [])
        return True

    def abort(self, request_id: str, index: int | None) -> list[Chunk] | None:
        """End a request that waits here, or one sample of it; None = it does not."""
        held = self._held.get(request_id)
        if held is None:
            return None
        if index is not None:
            held.aborted.append(index)
            return []
        del self._held[request_id]
        return [Chunk(request_id, i, [], finish_reason="abort") for i in range(held.message.params.n)]

    def ready(self) -> Iterator[Ready]:
        """Those that need not wait any longer, in the order in which they came; they leave."""
        for request_id in [request_id for request_id, held in self._held.items() if held.compiled.done()]:
            held = self._held.pop(request_id)
            yield Ready(held.message, held.aborted, _error(held.compiled))


def _error(compiled: Future[object]) -> str | None:
    try:
        compiled.result()
    except QuireError as error:
        return str(error)
    except Exception as error:
        log.exception("a grammar cannot be compiled")
        return f"the request cannot be run: {type(error).__name__}"
    return None
