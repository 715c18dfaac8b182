"""What would have been: ghosts of the cache, that hold names instead of K/V, on a sample of the blocks.

A block is sampled by its key, so that every use of a sampled block is seen; a cache of a part of the capacity that
serves this part of the blocks has the hit rate of the whole (SHARDS, Waldspurger et al., FAST 2015).
"""

from __future__ import annotations

from .eviction import Lru, Order, Paging

# The predictions are left when their ghost misses so much more often than the ghost of LRU, on blocks seen before: a
# first use misses in any cache, and with those counted in, 1.2 would let a third of the hits go. They are taken up
# again when they do not miss more often.
DISTRUST = 1.05
TRUST = 1.0

# Requests over which misses are averaged, in capacities. Twice as many gave the same figures.
WINDOW = 1.0

# Fewer averaged misses than this decide nothing.
EVIDENCE = 16.0


class Guard:
    """Do the predictions pay? Two ghosts of one capacity, one that goes by them and one that is plain LRU."""

    def __init__(self, capacity: int, order: Order[bytes]) -> None:
        self.trusted = True
        self._predicted = Paging(capacity, order)
        self._lru: Paging[bytes] = Paging(capacity, Lru())
        self._fade = 1 - 1 / (WINDOW * capacity)
        self._predicted_misses = 0.0
        self._lru_misses = 0.0

    def request(self, key: bytes, bit: int, *, again: bool) -> None:
        """A use of a sampled block. The first use misses in every cache, so only those seen `again` are counted."""
        predicted = self._predicted.request(key, bit)
        lru = self._lru.request(key, bit)
        if not again:
            return
        self._predicted_misses = self._predicted_misses * self._fade + (not predicted)
        self._lru_misses = self._lru_misses * self._fade + (not lru)
        if self._predicted_misses + self._lru_misses < EVIDENCE:
            return
        limit = DISTRUST if self.trusted else TRUST
        self.trusted = self._predicted_misses <= limit * self._lru_misses


class Belady:
    """Would the offline optimum have kept a page from one use to the next?

    The optimum keeps what fits, shortest intervals first; going through uses in time, a page is kept when every moment
    since its last use has room for it (OPTgen of Hawkeye, Jain and Lin, ISCA 2016). Time is counted in uses, and room
    in `QUANTA` slices of the last `REACH` capacities.
    """

    REACH = 8  # capacities; Hawkeye's: a longer past adds nothing to its labels
    QUANTA = 128

    def __init__(self, capacity: int) -> None:
        self.clock = 0
        self.capacity = capacity
        self.reach = self.REACH * capacity
        self._slice = max(1, self.reach // self.QUANTA)
        self._room = [capacity] * (self.reach // self._slice + 2)  # a ring of slices

    def tick(self) -> int:
        """The time of the next use."""
        self.clock += 1
        if self.clock % self._slice == 0:
            self._room[self.clock // self._slice % len(self._room)] = self.capacity
        return self.clock

    def kept(self, since: int) -> bool:
        """Whether a page used at `since`, and again now, was kept meanwhile; if so it took its room."""
        if self.clock - since > self.reach:
            return False
        room, size = self._room, len(self._room)
        slices = [i % size for i in range(since // self._slice, self.clock // self._slice)]
        if not all(room[i] for i in slices):
            return False
        for i in slices:
            room[i] -= 1
        return True
