"""When what is over: the time limits of requests, as a heap that a step looks at the top of."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .request import Group

SPARE = 64  # limits of groups that have ended, beside as many as there are of others: then they are cleared away


class _Limit(NamedTuple):
    """Names the group instead of holding it: it may end long before its limits are over."""

    when: float
    what: str  # "timeout", "deadline", "unreachable"
    request_id: str
    key: int


class TimeLimits:
    """groups: request id -> group, of all that have not ended; kept by the owner, and only read here."""

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self._groups = groups
        self._heap: list[_Limit] = []
        self._clear_at = SPARE

    def __len__(self) -> int:
        """At most twice as many as those of groups that have not ended, and SPARE."""
        return len(self._heap)

    def add(self, group: Group, when: float, what: str) -> None:
        if len(self._heap) >= self._clear_at:
            self._heap = [limit for limit in self._heap if self._group(limit) is not None]
            heapq.heapify(self._heap)
            self._clear_at = 2 * len(self._heap) + SPARE
        heapq.heappush(self._heap, _Limit(when, what, group.request_id, group.key))

    def over(self, now: float) -> Iterator[tuple[Group, str]]:
        """What is over by `now` of groups that have not ended: the group, and which limit; each once."""
        while self._heap and self._heap[0].when <= now:
            limit = heapq.heappop(self._heap)
            group = self._group(limit)
            if group is not None:
                yield group, limit.what

    def _group(self, limit: _Limit) -> Group | None:
        """Its group, None if that has ended. Another may have come by its id since."""
        group = self._groups.get(limit.request_id)
        return group if group is not None and group.key == limit.key else None
