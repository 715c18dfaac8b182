"""A timed load on an engine in this process: what the benchmarks of the scheduler drive.

    (due, AddRequest) … ──▶ Session ──handle()──▶ engine ──step()──▶ chunks ──▶ Timeline of each request

The engine is an `EngineCore` on the wall clock, or anything with its three methods on a clock of its own.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ..engine.messages import Abort, AddRequest
from ..scheduler.params import SamplingParams
from ..scheduler.plan import Chunk

if TYPE_CHECKING:
    from ..engine.core import EngineCore


class RequestFailed(Exception):
    """A request of the load was refused or failed, so nothing was measured."""


class Engine(Protocol):
    @property
    def has_work(self) -> bool: ...
    def handle(self, message: AddRequest | Abort) -> list[Chunk]: ...
    def step(self) -> list[Chunk]: ...


class Clock(Protocol):
    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...


class WallClock:
    """The engine's own clock: arrivals are told in `time.monotonic()`."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))


@dataclass(slots=True)
class Timeline:
    """One request as its client would see it, seconds on the session's clock.

    due          when it was to be sent; a step that was running then counts as waiting
    token_times  end of the step that drew each token
    """

    due: float
    prompt_tokens: int
    token_times: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.due

    @property
    def itls(self) -> list[float]:
        return [after - before for before, after in pairwise(self.token_times)]


class Session:
    """Sends requests when they are due, steps the engine, and notes when each token came."""

    def __init__(self, engine: Engine, clock: Clock | None = None) -> None:
        self.engine = engine
        self.clock = clock or WallClock()
        self.timelines: dict[str, Timeline] = {}

    def send(self, request: AddRequest, due: float | None = None) -> None:
        """Hand over one request that was due at `due` (None = now). Raises RequestFailed if it is refused."""
        due = self.clock.now() if due is None else due
        self.timelines[request.request_id] = Timeline(due, len(request.prompt_ids))
        self._note(self.engine.handle(msgspec.structs.replace(request, arrival=due)), due)

    def step(self) -> list[str]:
        """One engine step; the ids of the requests that ended in it."""
        chunks = self.engine.step()
        return self._note(chunks, self.clock.now())

    def play(
        self,
        load: Iterable[tuple[float, AddRequest]],
        on_end: Callable[[str], None] = lambda request_id: None,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Send each request so many seconds from now, and step until nothing is left or `enough()`.

        on_end(id) is called when a request has ended, and may send another. Requests left at the end are aborted.
        """
        start = self.clock.now()
        pending = deque(sorted(load, key=lambda item: item[0]))
        while (pending or self.engine.has_work) and not enough():
            now = self.clock.now()
            while pending and start + pending[0][0] <= now:
                offset, request = pending.popleft()
                self.send(request, start + offset)
            if self.engine.has_work:
                for request_id in self.step():
                    on_end(request_id)
            elif pending:
                self.clock.sleep(start + pending[0][0] - now)
        alive = [request_id for request_id, t in self.timelines.items() if t.finish_reason is None]
        if alive:
            self._note(self.engine.handle(Abort(alive)), self.clock.now())

    def _note(self, chunks: list[Chunk], now: float) -> list[str]:
        ended = []
        for chunk in chunks:
            if chunk.finish_reason == "error":
                raise RequestFailed(f"request {chunk.request_id} failed: {chunk.error}")
            timeline = self.timelines[chunk.request_id]
            timeline.token_times += [now] * len(chunk.token_ids)
            if chunk.finish_reason is not None:
                timeline.finish_reason = chunk.finish_reason
                ended.append(chunk.request_id)
        return ended


def start_engine(**settings: Any) -> EngineCore:
    """An engine with these fields of `EngineConfig`. Raises EngineStartError."""
    from ..engine.config import EngineConfig  # here, so that a simulated load needs no torch
    from ..engine.core import EngineCore

    return EngineCore(EngineConfig(**settings))


def prompt(draw: random.Random, length: int, vocab_size: int) -> list[int]:
    """Random ids: what the tokens are changes no time, and no two prompts share a prefix by chance."""
    return [draw.randrange(vocab_size) for _ in range(length)]


def greedy(max_tokens: int) -> SamplingParams:
    """Exactly so many tokens."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
