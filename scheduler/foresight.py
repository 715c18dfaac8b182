"""What the block pool asks before it gives a block up: the bit of each free block, and whether bits are to be believed.

a block is released ─▶ Predictor ─▶ its bit, for the pool's order
                         ▲   │
             gap, label  │   ▼
if it is sampled ────▶ Belady, Guard ─▶ trusted?
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass

from .eviction import Order
from .ghost import Belady, Guard
from .predict import Features, GapKind, Life, Predictor, gap_kind

# Sampled blocks that a ghost of the cache holds at least, where the pool has as many: fewer tell too little.
SAMPLED_BLOCKS = 256
MAX_SAMPLING = 64  # one block in so many is sampled at most; fewer would learn too slowly

# Times that a sampled block is looked at, for training, while it waits: also what it looks like when it waited long.
LOOKS = 4


def sampling(num_blocks: int) -> int:
    """One block in how many is sampled: all in a small pool, a power of two otherwise."""
    one_in = 1
    while one_in < MAX_SAMPLING and num_blocks // one_in > SAMPLED_BLOCKS:
        one_in *= 2
    return one_in


@dataclass(slots=True, eq=False)
class Wait:
    """A sampled block between two uses."""

    since: int  # on Belady's clock
    released: float  # seconds
    kind: GapKind
    looks: list[Features]


class Residence:
    """How long a free block stays: the time that the last so many allocations took."""

    MARKS = 64

    def __init__(self, num_blocks: int) -> None:
        self._step = max(1, num_blocks // self.MARKS)
        self._count = 0
        self._times: deque[float] = deque(maxlen=2 * self.MARKS)

    def taken(self, count: int, now: float) -> None:
        marks = (self._count + count) // self._step - self._count // self._step
        self._times.extend([now] * marks)
        self._count += count

    def seconds(self, evictable: int, now: float) -> float:
        """inf while the pool has not turned over, or its clock stands still."""
        marks = evictable // self._step + 1
        if marks > len(self._times):
            return math.inf
        return (now - self._times[-marks]) or math.inf


class Foresight:
    """Predicts for a pool of `num_blocks` blocks, and learns from a sample of what it sees: memory of a fixed size.

    A sampled block waits from its release to its next; then it tells how long that took, and whether the optimum would
    have kept it. Who waits for `Belady.reach` uses of sampled blocks will not be used again.
    """

    def __init__(self, num_blocks: int, ghost_order: Order[bytes]) -> None:
        one_in = sampling(num_blocks)
        capacity = max(1, (num_blocks - 1) // one_in)
        self._mask = one_in - 1
        self._predictor = Predictor()
        self._belady = Belady(capacity)
        self._guard = Guard(capacity, ghost_order)
        self._residence = Residence(num_blocks)
        self._waits: OrderedDict[bytes, Wait] = OrderedDict()  # longest waiting first, at most Belady.reach

    @property
    def trusted(self) -> bool:
        return self._guard.trusted

    def taken(self, count: int, now: float) -> None:
        """Blocks were allocated."""
        self._residence.taken(count, now)

    def horizon(self, evictable: int, now: float) -> float:
        """Seconds until the place of a block that is released now is needed, with so many that may be given up."""
        return self._residence.seconds(evictable, now)

    def released(self, key: bytes, life: Life, horizon: float) -> int:
        """The bit of a block that nobody holds any more."""
        now = life.released
        x = self._predictor.look(life, now, horizon)
        bit = self._predictor.bit(life, x)
        if not key[0] & self._mask:
            self._learn(key, life, x, bit)
        return bit

    def again(self, key: bytes, life: Life, now: float, horizon: float) -> int:
        """The bit of a block that has been free for a while."""
        x = self._predictor.look(life, now, horizon)
        if not key[0] & self._mask:
            wait = self._waits.get(key)
            if wait is not None and len(wait.looks) < LOOKS:
                wait.looks.append(x)
        return self._predictor.bit(life, x)

    def _learn(self, key: bytes, life: Life, x: Features, bit: int) -> None:
        clock = self._belady.tick()
        before = self._waits.pop(key, None)
        if before is not None:
            gap = max(0.0, life.used - before.released)
            self._learned(before, gap, int(not self._belady.kept(before.since)))
        self._guard.request(key, bit, again=before is not None)
        self._waits[key] = Wait(clock, life.released, gap_kind(life), [x])
        while next(iter(self._waits.values())).since < clock - self._belady.reach:
            self._learned(self._waits.popitem(last=False)[1], math.inf, 1)

    def _learned(self, wait: Wait, gap: float, bit: int) -> None:
        """A wait is over: the block was wanted again after `gap` seconds, and the optimum would have done `bit`."""
        self._predictor.gaps.observe(wait.kind, gap)
        for x in wait.looks:
            self._predictor.learned.train(x, bit)
