"""Requests that wait for their grammars, which are compiled beside the engine's loop, on every rank.

hold(AddRequest) ──as soon as there is room, a thread compiles──▶ ready() ──▶ the scheduler ──▶ release(), at its end
                   abort(), expire(): as if it waited there already
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from llguidance import LLMatcher

from ..scheduler.params import Grammar
from ..scheduler.plan import Chunk
from .errors import QuireError
from .grammar import Grammars
from .messages import AddRequest
from .ranks import Ranks

log = logging.getLogger(__name__)


class Ready(NamedTuple):
    """aborted: samples that were ended meanwhile; error: why the grammar cannot be had."""

    message: AddRequest
    aborted: list[int]
    error: str | None


@dataclass(slots=True)
class _Held:
    message: AddRequest
    grammar: Grammar
    limit: tuple[float, str]  # when its time is over, on the clock of the arrivals, and by what
    compiled: Future[LLMatcher] | None = None  # None = there was no room yet
    aborted: list[int] = field(default_factory=list)


class Compiling:
    def __init__(self, grammars: Grammars, ranks: Ranks) -> None:
        self._grammars = grammars
        self._ranks = ranks
        self._in_use: dict[str, Grammar] = {}  # by request, until `release`
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def wait(self, seconds: float) -> None:
        """Until one of them need not wait any longer, or so long; not at all where nobody waits."""
        compiled = [held.compiled for held in self._held.values() if held.compiled is not None]
        if compiled:
            wait(compiled, seconds, FIRST_COMPLETED)

    def hold(self, message: AddRequest) -> bool:
        """Whether the request has to wait; it is kept here then. Its grammar is kept until `release`, in any case."""
        grammar, request_id = message.params.grammar, message.request_id
        if grammar is None or request_id in self._in_use:  # an id that is in use is for the scheduler to refuse
            return False
        if grammar in self._grammars:
            self._prepare(request_id, grammar)
            return False
        self._held[request_id] = _Held(message, grammar, _limit(message))
        self._go_on()
        return True

    def _go_on(self) -> None:
        """Have compiled what there is room for; nobody overtakes."""
        for request_id, held in self._held.items():
            if held.compiled is None:
                if not self._grammars.has_room(held.grammar):
                    return
                held.compiled = self._prepare(request_id, held.grammar)

    def _prepare(self, request_id: str, grammar: Grammar) -> Future[LLMatcher]:
        self._in_use[request_id] = grammar
        self._ranks.prepare(grammar)
        return self._grammars.prepare(grammar)

    def release(self, request_id: str) -> None:
        """The request has ended, here or in the scheduler; one without a grammar has nothing to release."""
        grammar = self._in_use.pop(request_id, None)
        if grammar is not None:
            self._grammars.release(grammar)
            self._ranks.release(grammar)

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

    def expire(self, now: float) -> list[Chunk]:
        """End those whose time is over."""
        chunks = []
        for request_id in [request_id for request_id, held in self._held.items() if held.limit[0] <= now]:
            held = self._held.pop(request_id)
            chunks += [
                Chunk(request_id, i, [], finish_reason="expired", error=held.limit[1])
                for i in range(held.message.params.n)
            ]
        return chunks

    def ready(self) -> Iterator[Ready]:
        """Those that need not wait any longer, in the order in which they came; they leave."""
        self._go_on()
        for request_id, held in list(self._held.items()):
            if held.compiled is not None and held.compiled.done():
                del self._held[request_id]
                yield Ready(held.message, held.aborted, _error(held.compiled))


def _limit(message: AddRequest) -> tuple[float, str]:
    """The earlier of the limits that need no plan to be known."""
    limits = ((message.timeout, "timeout"), (message.slo.deadline, "deadline"))
    ends = [(message.arrival + seconds, what) for seconds, what in limits if seconds is not None]
    return min(ends, default=(math.inf, ""))


def _error(compiled: Future[LLMatcher]) -> str | None:
    try:
        compiled.result()
    except QuireError as error:
        return str(error)
    except Exception as error:
        log.exception("a grammar cannot be compiled")
        return f"the request cannot be run: {type(error).__name__}"
    return None
