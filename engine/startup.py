"""The phases of a start: how long each took, and which one goes on, for whoever waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .messages import Progress


class Startup:
    def __init__(self, tell: Callable[[Progress], None] = lambda progress: None) -> None:
        self.seconds: dict[str, float] = {}  # of the phases that are over
        self._tell = tell
        self._phase = ""
        self.settled = False  # the settings have turned out to be right; what may still fail is the machine, or a file

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phase = name
        self._report(None)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)

    def settle(self) -> None:
        self.settled = True

    def advance(self, done: float) -> None:
        """So much of the present phase is done, 0 to 1."""
        self._report(done)

    def _report(self, done: float | None) -> None:
        self._tell(Progress(self._phase, dict(self.seconds), done, self.settled))
