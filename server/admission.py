"""Who gets in: a bounded number of samples in the house, counted at the moment they are let in.

    admit() ──▶ Slot ──▶ release(), exactly once, whatever happens in between

Past the bound a request is refused at once, while it has cost nothing, instead of waiting longer than its caller will.
"""

from __future__ import annotations

import asyncio

from . import errors


class Slot:
    """A place for `size` samples; `release` may be called twice, and counts once."""

    def __init__(self, admission: Admission, size: int) -> None:
        self._admission = admission
        self._size = size

    def release(self) -> None:
        size, self._size = self._size, 0
        self._admission.give_back(size)


class Admission:
    """Counts the open samples of all requests. Used on the event loop only, so check and count are one step.

    A request is let in while there is any room at all and may overshoot by its own samples: otherwise a batch larger
    than the bound could never run, and one close to it would starve behind small ones.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.open = 0
        self.requests = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(self, size: int) -> Slot:
        """Take a place for `size` samples. Raises 503 while draining, or when the house is full."""
        if self.draining:
            raise errors.draining()
        if self.open >= self.capacity:
            raise errors.overloaded()
        self.open += size
        self.requests += 1
        self._idle.clear()
        return Slot(self, size)

    def give_back(self, size: int) -> None:
        if not size:
            return
        self.open -= size
        self.requests -= 1
        if not self.open:
            self._idle.set()

    async def drain(self, timeout: float) -> bool:
        """Let nobody in any more and wait for those inside; False if some are still there after `timeout` seconds."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True
