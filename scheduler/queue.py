"""Who waits: one heap per lane. The `fair` policy has a lane for each tenant, the others have one for all."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .request import Request


class WaitingQueue:
    """Requests by `Request.order`; removal of ended ones is lazy (`Request.finished`)."""

    def __init__(self) -> None:
        self._lanes: dict[str, list[tuple[tuple[float, int], Request]]] = {}
        self._size = 0
        self.work = 0.0  # predicted seconds of all that wait

    def __len__(self) -> int:
        return self._size

    @property
    def lanes(self) -> list[str]:
        return list(self._lanes)

    def push(self, request: Request, lane: str = "") -> None:
        heapq.heappush(self._lanes.setdefault(lane, []), (request.order, request))
        self._count(request, 1)

    def discard(self, request: Request) -> None:
        """`request`, which waits here and was just marked finished, no longer counts."""
        self._count(request, -1)

    def head(self, lane: str = "") -> Request | None:
        """The first of a lane, which stays in it."""
        heap = self._lanes.get(lane, [])
        while heap and heap[0][1].finished:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def drain(self, lane: str = "") -> Iterator[Request]:
        """Pop a lane in order. Whoever cannot take one pushes it back when done."""
        heap = self._lanes.get(lane, [])
        while heap:
            request = heapq.heappop(heap)[1]
            if not request.finished:
                self._count(request, -1)
                yield request
        self._lanes.pop(lane, None)

    def _count(self, request: Request, sign: int) -> None:
        self._size += sign
        self.work = self.work + sign * request.work if self._size else 0.0
