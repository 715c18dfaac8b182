"""Who gets in: as many samples as the house holds, and no more work than can be begun in time.

    admit() ──▶ Slot ──▶ release(), exactly once, whatever happens in between

Past the bounds a request is refused at once, while it has cost nothing, instead of waiting longer than its caller will.
The predicted wait is the engine's own figure and the cost of what that figure does not know of yet: whatever was let in
and is being tokenized, or was sent and not yet taken in.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..engine.messages import StepStats
from . import errors
from .cost import Cost

PACE_ENDS = 1024  # samples over whose ends the pace of a full house is taken: several steps in which many end at once
LEAST_ENDS = 8  # of fewer nothing can be said: then the predicted cost is all there is


class Slot:
    """A place for `size` samples of one tenant. Samples give theirs back one by one as they end, `release` the rest;
    it may be called twice, and counts once.
    """

    def __init__(
        self, admission: Admission, size: int, cost: Cost, tenant: str, *, prompt_tokens: float, beyond: bool
    ) -> None:
        """`beyond`: let in although the house was full."""
        self.size = size
        self.cost = cost
        self.tenant = tenant
        self.beyond = beyond
        self._admission = admission
        self._open = size
        self._prompt_tokens = self._queued_tokens = prompt_tokens
        self._released = False

    def sent(self, request_count: int) -> None:
        """The engine has been sent so many requests by now, this slot's included."""
        self._admission.was_sent(self, request_count)

    def prompt_computed(self, share: float) -> None:
        """One of the request's prompts, `share` of its prompt tokens, waits no more."""
        tokens = min(share * self._prompt_tokens, self._queued_tokens)
        self._queued_tokens -= tokens
        self._admission.leave_queue(self, tokens)

    def sample_ended(self) -> None:
        self._open -= 1
        self._admission.saw_end()
        self._admission.give_back(self, 1)

    def release(self) -> None:
        if not self._released:
            self._released = True
            self.prompt_computed(1.0)
            self._admission.give_back(self, self._open)
            self._admission.leave(self)


@dataclass(slots=True)
class _Holding:
    """What one tenant has in the house."""

    slots: int = 0
    samples: int = 0
    seconds: float = 0.0  # of the engine's time, as predicted when they came
    queued_tokens: float = 0.0  # of prompts that have not been computed


class Admission:
    """Counts the open samples of all requests. Used on the event loop only, so check and count are one step.

    capacity           samples in the house: those that run and those that may wait
    places             of these, how many run at once
    max_queued_tokens  of prompts that have not been computed, past which nobody is let in; None = no such bound
    max_queue_seconds  predicted wait past which nobody is let in; None = no such bound
    weights            tenant -> its share beside others'; 1 for who is not named
    clock              seconds

    A request is let in while there is any room at all and may overshoot by its own size: otherwise a batch larger
    than the bound could never run, and one close to it would starve behind small ones.
    """

    def __init__(
        self,
        capacity: int,
        *,
        places: int | None = None,
        max_queued_tokens: int | None = None,
        max_queue_seconds: float | None = None,
        weights: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity = capacity
        self.open = 0
        self.requests = 0
        self.draining = False
        self.queued_tokens = 0.0
        self._open_beyond = 0  # samples that were let in when the house was full
        self._places = capacity if places is None else places
        self._max_queued_tokens = max_queued_tokens
        self._max_queue_seconds = max_queue_seconds
        self._weights = weights or {}
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=PACE_ENDS)  # when samples ended while the house was full
        self._holdings: dict[str, _Holding] = {}
        self._stats = StepStats()
        self._unseen: dict[Slot, float] = {}  # seconds of queue that the engine's figures do not know of
        self._in_flight: deque[tuple[int, Slot]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(
        self,
        size: int,
        cost: Cost = Cost(),  # noqa: B008 (a tuple)
        tenant: str = "",
        *,
        prompt_tokens: float = 0.0,
    ) -> Slot:
        """Take a place for `size` samples. Raises 503 while draining, or when the house is full; 429 when it is this
        tenant that has filled it.
        """
        if self.draining:
            raise errors.draining()
        beyond = self._is_full_for_others(tenant)
        slot = Slot(self, size, cost, tenant, prompt_tokens=prompt_tokens, beyond=beyond)
        holding = self._holdings.setdefault(tenant, _Holding())
        holding.slots += 1
        holding.samples += size
        holding.seconds += cost.total
        holding.queued_tokens += prompt_tokens
        self.queued_tokens += prompt_tokens
        waiting = min(max(self.open + size - self._places, 0), size)
        self._unseen[slot] = cost.prompts + cost.samples * waiting / size
        self.open += size
        self._open_beyond += size * beyond
        self.requests += 1
        self._idle.clear()
        return slot

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """In place of those there were."""
        self._weights = weights

    def predicted_wait(self) -> float:
        """Seconds that a request let in now would wait for its first step."""
        return self._stats.queue_seconds + sum(self._unseen.values())

    def was_sent(self, slot: Slot, request_count: int) -> None:
        self._in_flight.append((request_count, slot))

    def saw_step(self, stats: StepStats) -> None:
        """The engine's newest figures."""
        self._stats = stats
        while self._in_flight and self._in_flight[0][0] <= stats.requests_total:
            _, slot = self._in_flight.popleft()
            self._unseen.pop(slot, None)

    def saw_end(self) -> None:
        """A sample ended by itself."""
        if self.open >= self.capacity:
            self._ends.append(self._clock())

    def give_back(self, slot: Slot, count: int) -> None:
        holding = self._holdings[slot.tenant]
        holding.samples -= count
        holding.seconds -= slot.cost.total * count / slot.size
        self.open -= count
        if self.open < self.capacity:
            self._ends.clear()
        self._open_beyond -= count * slot.beyond

    def leave_queue(self, slot: Slot, tokens: float) -> None:
        self._holdings[slot.tenant].queued_tokens -= tokens
        self.queued_tokens -= tokens

    def leave(self, slot: Slot) -> None:
        self._unseen.pop(slot, None)
        self.requests -= 1
        holding = self._holdings[slot.tenant]
        holding.slots -= 1
        if not holding.slots:
            del self._holdings[slot.tenant]
        if not self.requests:
            self.queued_tokens = 0.0  # and not what is left of adding and subtracting fractions
            self._idle.set()

    async def drain(self, timeout: float) -> bool:
        """Let nobody in any more and wait for those inside; False if some are still there after `timeout` seconds."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def _is_full_for_others(self, tenant: str) -> bool:
        """Whether the house is full, and `tenant` gets in all the same: it has less than its share, because another has
        more. Raises 503 or 429 when it does not get in.
        """
        wait = self.predicted_wait()
        bound, most_tokens = self._max_queue_seconds, self._max_queued_tokens
        mine = self._holdings.get(tenant, _Holding())
        if self.open >= self.capacity:
            full = f"{self.open} samples are open, and it holds {self.capacity}"
            share, held, unit = self._share(tenant) * self.capacity, float(mine.samples), "samples"
        elif most_tokens is not None and self.queued_tokens >= most_tokens:
            full = f"{self.queued_tokens:.0f} prompt tokens wait, and {most_tokens} may"
            share, held, unit = self._share(tenant) * most_tokens, mine.queued_tokens, "prompt tokens that wait"
        elif bound is not None and wait > bound:
            full = f"a new request would wait longer than {bound:g} s"
            share, held, unit = self._share(tenant) * bound, mine.seconds, "s of the engine's time"
        else:
            return False
        retry_after = self._seconds_until_room(wait)
        others = bool(self._holdings.keys() - {tenant})
        if others and held > share:
            raise errors.tenant_overloaded(f"{held:.4g} {unit}, and its share is {share:.4g}", wait, retry_after)
        # Those within their share come to one more house at most; made-up tenants get no third.
        if others and held < share and self._open_beyond < self.capacity:
            return True
        raise errors.overloaded(full, wait, retry_after)

    def _share(self, tenant: str) -> float:
        """Of the house, between those inside and `tenant`."""
        weights = {name: self._weights.get(name, 1.0) for name in (*self._holdings, tenant)}
        return weights[tenant] / sum(weights.values())

    def _seconds_until_room(self, wait: float) -> float:
        """Until so many samples have ended, so many tokens been computed, and the wait is back under its bound."""
        for_samples = max(self.open - self.capacity + 1, 0) * self._seconds_per_sample()
        for_tokens = 0.0
        if self._max_queued_tokens is not None and self.queued_tokens > self._max_queued_tokens:
            for_tokens = wait * (1 - self._max_queued_tokens / self.queued_tokens)
        for_wait = wait - self._max_queue_seconds if self._max_queue_seconds is not None else 0.0
        return max(for_samples, for_tokens, for_wait)

    def _seconds_per_sample(self) -> float:
        """The pace at which samples end in the full house; before enough have, the one that their cost predicts."""
        later = sum(end > self._ends[0] for end in self._ends)
        if later >= LEAST_ENDS:
            return (self._clock() - self._ends[0]) / later
        return sum(holding.seconds for holding in self._holdings.values()) / max(self.open, 1)
