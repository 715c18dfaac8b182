"""How much of the engine each tenant has had: virtual counters, in predicted seconds over the tenant's weight.

After the Virtual Token Counter of Sheng et al. (arXiv 2401.00588), with seconds of the step-time model in place of
tokens: a cached prefix costs nothing, and a long context costs what it takes.

A tenant that returns is lifted to the least served of the active ones, or to the last one that left an empty house, so
nobody saves up while away.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import TypeVar

T = TypeVar("T")

# Counters of absent tenants are kept while they are ahead of the active ones, at most so many: the names are the
# callers', and memory is not theirs to fill.
ABSENT = 4096
KEPT = ABSENT * 7 // 8  # of too many: they are sorted once for so many departures, and not for each


class Service:
    def __init__(self, weights: Mapping[str, float], max_num_seqs: int) -> None:
        """weights: tenant -> share; 1 for who is not named, until a request says otherwise."""
        self._weights = dict(weights)
        self._told: dict[str, float] = {}  # by requests; kept as long as the tenant's counter
        self._max_num_seqs = max_num_seqs
        self._seconds: dict[str, float] = {}
        self._floor = 0.0  # counter of the last tenant that left an empty house
        self._present: dict[str, int] = {}  # tenant -> its requests in the house
        # The weight of these. Added up exactly: a share that is met does not seem exceeded, however many came and went.
        self._exact = Fraction(0)
        self._total = 0.0
        self._held: dict[str, int] = {}  # tenant -> its running samples

    def weight(self, tenant: str) -> float:
        return self._told.get(tenant) or self._weights.get(tenant, 1.0)

    def seconds(self, tenant: str) -> float:
        """Weighted seconds that `tenant` was served."""
        return self._seconds.get(tenant, 0.0)

    def arrives(self, tenant: str, weight: float | None = None) -> None:
        """A request of `tenant` came in. `weight`: its share from now on; None = as it was."""
        if tenant in self._present:
            self._exact -= Fraction(self.weight(tenant))
        else:
            self._seconds[tenant] = max(self.seconds(tenant), self._least())
        if weight is not None:
            self._told[tenant] = weight
        self._exact += Fraction(self.weight(tenant))
        self._total = float(self._exact)
        self._present[tenant] = self._present.get(tenant, 0) + 1

    def leaves(self, tenant: str) -> None:
        """One ended."""
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]
            self._exact -= Fraction(self.weight(tenant))
            self._total = float(self._exact)
            if not self._present:
                self._floor = max(self._floor, self.seconds(tenant))
            self._forget()

    def enters(self, tenant: str) -> None:
        """A sample of `tenant` began to run."""
        self._held[tenant] = self._held.get(tenant, 0) + 1

    def stops(self, tenant: str) -> None:
        """One stopped running."""
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]

    def charge(self, tenant: str, seconds: float) -> None:
        self._seconds[tenant] = self.seconds(tenant) + seconds / self.weight(tenant)

    def exceeds_share(self, tenant: str) -> bool:
        """Whether `tenant` runs more samples than its weight among the tenants in the house gives it, which is one at
        least: with more tenants than places, displacing for less stops every stream for seconds and serves nobody more.
        """
        return self._held.get(tenant, 0) > max(1.0, self._max_num_seqs * self.weight(tenant) / self._total)

    def interleave(self, lanes: Mapping[str, Iterator[T]], cost: Callable[[T], float]) -> Iterator[T]:
        """Everything in `lanes` (tenant -> its requests in order), the least served tenant first at every turn.

        What is handed out counts as served for the turns that follow, `cost` seconds each. A lane is not asked for
        more than comes out.
        """
        served = [(self.seconds(tenant), tenant) for tenant in lanes]
        heapq.heapify(served)
        while served:
            seconds, tenant = served[0]
            item = next(lanes[tenant], None)
            if item is None:
                heapq.heappop(served)
            else:
                heapq.heapreplace(served, (seconds + cost(item) / self.weight(tenant), tenant))
                yield item

    def _least(self) -> float:
        """What a newcomer is lifted to."""
        return min((self.seconds(tenant) for tenant in self._present), default=self._floor)

    def _forget(self) -> None:
        """Of too many absent tenants, drop the counters that returning would lift anyway, and the least of the others
        down to KEPT.
        """
        if len(self._seconds) - len(self._present) <= ABSENT:
            return
        absent = sorted((s, tenant) for tenant, s in self._seconds.items() if tenant not in self._present)
        least = self._least()
        for i, (seconds, tenant) in enumerate(absent):
            if seconds <= least or len(absent) - i > KEPT:
                del self._seconds[tenant]
                self._told.pop(tenant, None)
