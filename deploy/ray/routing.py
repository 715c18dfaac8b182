"""Which replica gets a request: the one whose cache holds most of it, unless too many are there already.

    rank(chain, open) ──▶ names, best first          sent(name, chain): it holds this from now on

Pure: no clock, no network, no Ray. What a replica holds is what it was sent, the least recently used of it forgotten
past what its KV cache has room for; its engine forgets in the same order.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping

from .prefix import Chain

# What a request that is open at a replica weighs against chunks of prefix that lie there: a prefix of 4 chunks (128
# tokens or so) is worth joining a batch that is larger by one, not by two. By the step times of an 8B model on an H100
# a stream costs those beside it as much as the prefill of some 8 chunks over its life, half of it still to come.
# `simulate.py --sweep` plays traffic against other weights: less crowds conversations together, more scatters them.
OPEN_CHUNKS = 4

UNKNOWN_CAPACITY = 4096  # chunks, of a replica that has not told yet: half a mebibyte of text


class Held:
    """Names of the chunks that lie in one replica's cache, as far as one can know who sees what is sent there."""

    def __init__(self, capacity: int = UNKNOWN_CAPACITY) -> None:
        """`capacity`: chunks."""
        self.capacity = capacity
        self._names: OrderedDict[bytes, None] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._names)

    def match(self, chain: Chain) -> int:
        """How many chunks of `chain` lie here, from its beginning."""
        for count, name in enumerate(chain):
            if name not in self._names:
                return count
        return len(chain)

    def add(self, chain: Chain) -> None:
        """It has been sent here. Its end is forgotten before its beginning, without which it would be worth nothing."""
        for name in reversed(chain):
            self._names[name] = None
            self._names.move_to_end(name)
        self.resize(self.capacity)

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        while len(self._names) > capacity:
            self._names.popitem(last=False)

    def clear(self) -> None:
        self._names.clear()


class Fleet:
    """The replicas as one process that routes knows them. With `open_chunks` 0 only prefixes count."""

    def __init__(self, open_chunks: float = OPEN_CHUNKS, seed: int | None = None) -> None:
        self.open_chunks = open_chunks
        self._draw = random.Random(seed)
        self._held: dict[str, Held] = {}
        self._engines: dict[str, int] = {}

    def keep(self, names: Collection[str]) -> None:
        """These are the replicas now: of others nothing is remembered."""
        self._held = {name: self._held.get(name) or Held() for name in names}
        self._engines = {name: engine for name, engine in self._engines.items() if name in self._held}

    def told(self, name: str, *, capacity: int, engine: int) -> None:
        """A replica's own report: room for so many chunks, in the cache of its `engine`-th engine. Another engine than
        before has begun with an empty one.
        """
        held = self._held[name]
        if self._engines.get(name, engine) != engine:
            held.clear()
        self._engines[name] = engine
        held.resize(capacity)

    def sent(self, name: str, chain: Chain) -> None:
        if name in self._held:
            self._held[name].add(chain)

    def match(self, name: str, chain: Chain) -> int:
        return self._held[name].match(chain)

    def rank(self, chain: Chain, open: Mapping[str, int], avoid: Iterable[str] = ()) -> list[str]:
        """All replicas but those to avoid, best first. `open`: requests that are open at each, 0 where not given.

        The first is the best of three: the one that holds most, and two drawn by lot. Were it the best of all, several
        processes that route by figures a moment old would all send to the same one (the power of two choices).
        """
        names = sorted(self._held.keys() - set(avoid))
        self._draw.shuffle(names)
        matches = {name: self.match(name, chain) for name in names}
        worth = {name: matches[name] - self.open_chunks * open.get(name, 0) for name in names}
        names.sort(key=worth.__getitem__, reverse=True)  # stable: among equals, the lot decides
        if len(names) <= 2:
            return names
        drawn = {*self._draw.sample(names, 2)}
        most = max(names, key=matches.__getitem__)
        if matches[most]:
            drawn.add(most)
        return [name for name in names if name in drawn] + [name for name in names if name not in drawn]
