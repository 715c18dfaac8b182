"""When what is over: the time limits of requests, as a heap that a step looks at the top of."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from .request import Group


class Limit(NamedTuple):
    """Names the group instead of holding it: it is forgotten when it ends, long before its limits are over."""

    when: float
    what: str  # "timeout", "deadline", "unreachable"
    request_id: str
    key: int


class TimeLimits:
    def __init__(self) -> None:
        self._heap: list[Limit] = []

    def add(self, group: Group, when: float, what: str) -> None:
        heapq.heappush(self._heap, Limit(when, what, group.request_id, group.key))

    def over(self, now: float) -> Iterator[Limit]:
        """What is over by `now`, each once."""
        while self._heap and self._heap[0].when <= now:
            yield heapq.heappop(self._heap)
