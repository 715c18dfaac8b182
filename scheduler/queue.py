"""Who waits, in which order. Priorities age: waiting long enough outweighs any priority, so nobody starves."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .request import Request

# One priority level is worth this much waiting. All waiting requests age at the same rate, so the order between two
# never changes while they wait: it is a constant of the request, and a heap is enough.
AGEING_SECONDS = 10.0


def order(priority: int, arrival: float, serial: int) -> tuple[float, int]:
    """Lower runs first. `arrival` in seconds; `serial` decides between equals."""
    return arrival + priority * AGEING_SECONDS, serial


class WaitingQueue:
    """Requests by `Request.order`; removal of aborted ones is lazy (`Request.finished`)."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, int], Request]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.order, request))
        self._size += 1

    def discard(self, request: Request) -> None:
        """`request`, which waits here and was just marked finished, no longer counts."""
        self._size -= 1

    def drain(self) -> Iterator[Request]:
        """Pop in order. Whoever cannot take one pushes it back when done."""
        while self._heap:
            request = heapq.heappop(self._heap)[1]
            if not request.finished:
                self._size -= 1
                yield request
