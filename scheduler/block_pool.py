"""Who owns which KV block.

A block is held (refs > 0), or free. A free block with content can still be shared, until it is handed out again. Blocks
without content are handed out first, then those that an eviction order (`eviction.py`) gives up, the end of a chain
before what it continues: with chained keys nobody could find the rest. Block 0 is the null block: never handed out,
padding is written there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .eviction import Order, order_of
from .foresight import Foresight
from .predict import BlockFacts, Life

# Free blocks whose bit is predicted anew for each block that is given up: the whole pool once in the time in which it
# turns over, so that what waits too long is given up after all. Twice as many gained nothing.
LOOKS_PER_EVICTION = 1

NO_FACTS = BlockFacts()


class BlockContent(NamedTuple):
    """What a published block holds. Equal keys are believed only if this is equal too."""

    key: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class Census(NamedTuple):
    """Held blocks: by several; by one, with content that can be found; by one, without."""

    shared: int
    whole: int
    open: int


class BlockPool:
    """`eviction` names the order: "lru", or "discard" and "phase", which go by predictions (`predict.py`).

    Whoever drives the pool sets `now` [seconds] once a step; it is only used to predict.
    """

    def __init__(self, num_blocks: int, eviction: str = "lru", seed: int = 0) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}: at least 2 are needed, the null block and one to use")
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self.num_cached = 0  # free blocks that have content
        self.num_evicted = 0  # blocks with content that were handed out for something else, since the start
        self.now = 0.0
        self._refs = [0] * num_blocks
        self._content: list[BlockContent | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._empty = [*range(num_blocks - 1, 0, -1)]  # free blocks without content
        self._order: Order[int] = order_of(eviction, seed)  # free blocks with content
        self._continued: dict[bytes, int] = {}  # key -> how many free blocks with content continue it
        self._foresight = Foresight(num_blocks, order_of(eviction, seed)) if eviction != "lru" else None
        self._lives: list[Life | None] = [None] * num_blocks  # of blocks with content, if there is foresight
        self._hand = 0

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def take(self, count: int) -> list[int] | None:
        """`count` blocks to write into, each with one holder; None, and no change, when there are not as many."""
        if count > self.num_free:
            return None
        given_up = max(0, count - len(self._empty))
        blocks = [self._empty.pop() if self._empty else self._give_up() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        self.num_free -= count
        if self._foresight is not None:
            self._foresight.taken(count, self.now)
            self._look_again(self._foresight, LOOKS_PER_EVICTION * given_up)
        return blocks

    def share(self, block: int) -> None:
        """One more holder of a block that is held, or is free with content. ValueError for a free one without."""
        if self._refs[block] == 0:
            content = self._content[block]
            if content is None:
                raise ValueError(f"block {block} is free and has no content to share: take() hands out such blocks")
            self._order.remove(block)
            self._leave_cache(content)
            self.num_free -= 1
            life = self._lives[block]
            if life is not None:
                life.hits += 1
                life.used = self.now
        self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less of each. Give a sequence's blocks last first, so that its tail is reused before its head."""
        horizon = self._horizon()
        for block in blocks:
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self.num_free += 1
                content = self._content[block]
                if content is None:
                    self._empty.append(block)
                else:
                    self._enter_cache(block, content, horizon)

    def publish(self, block: int, content: BlockContent, facts: BlockFacts = NO_FACTS) -> None:
        """Offer a full, held block for sharing. The first block of a key stays the one that is found."""
        if content.key in self._by_key:
            return
        self._by_key[content.key] = block
        self._content[block] = content
        if self._foresight is not None:
            self._lives[block] = Life(facts, self.now, self.now, self.now)
            before = self._lives[self._by_key.get(content.parent, 0)]
            if before is not None and not facts.sample:
                before.children += 1

    def retract(self, blocks: Iterable[int]) -> None:
        """Take held blocks out of the index: their content is in doubt."""
        for block in blocks:
            self._erase(block)

    def find(self, key: bytes, parent: bytes, token_ids: Sequence[int]) -> int | None:
        """The block that holds exactly these tokens after that parent."""
        block = self._by_key.get(key)
        if block is None:
            return None
        content = self._content[block]
        if content is None or content.parent != parent or content.token_ids != tuple(token_ids):
            return None
        return block

    def holds_output(self, block: int) -> bool:
        """Whether a published block is known to hold output tokens; with "lru" nobody asks, and it is not known."""
        life = self._lives[block]
        return life is not None and life.facts.generated

    def census(self) -> Census:
        """A walk over all blocks."""
        shared = sum(refs > 1 for refs in self._refs)
        whole = sum(refs == 1 and content is not None for refs, content in zip(self._refs, self._content, strict=True))
        return Census(shared, whole, self.num_used - shared - whole)

    def _horizon(self) -> float:
        return self._foresight.horizon(self.num_cached, self.now) if self._foresight is not None else 0.0

    def _enter_cache(self, block: int, content: BlockContent, horizon: float) -> None:
        """A block with content is not held any more."""
        self.num_cached += 1
        before = self._by_key.get(content.parent)
        life, bit = self._lives[block], 0
        if self._foresight is not None and life is not None:
            life.released = self.now
            life.orphan = life.facts.depth > 0 and before is None
            bit = self._foresight.released(content.key, life, horizon)
        self._order.add(block, bit, covered=content.key in self._continued)
        count = self._continued.get(content.parent, 0)
        self._continued[content.parent] = count + 1
        if count == 0 and before is not None and self._refs[before] == 0:
            self._order.cover(before)
        # A holder had its own copy of what comes before, which is free: it was used with this block all the same.
        while before is not None and self._refs[before] == 0:
            self._order.touch(before)
            above = self._content[before]
            before = self._by_key.get(above.parent) if above is not None else None

    def _leave_cache(self, content: BlockContent) -> None:
        """A free block with this content, gone from the order already, is held or given up."""
        self.num_cached -= 1
        count = self._continued.pop(content.parent) - 1
        if count:
            self._continued[content.parent] = count
            return
        before = self._by_key.get(content.parent)
        if before is not None and self._refs[before] == 0:
            self._order.uncover(before)

    def _give_up(self) -> int:
        """The free block with content whose loss should hurt least; it has none now."""
        order = self._order
        block = order.victim() if self._foresight is None or self._foresight.trusted else order.oldest()
        content = self._content[block]
        if content is not None:
            self._leave_cache(content)
        self._erase(block)
        self.num_evicted += 1
        return block

    def _look_again(self, foresight: Foresight, count: int) -> None:
        """Predict `count` blocks anew, all in turn."""
        horizon = self._horizon()
        for _ in range(count):
            self._hand = (self._hand + 1) % self.num_blocks
            life, content = self._lives[self._hand], self._content[self._hand]
            if life is not None and content is not None and self._refs[self._hand] == 0:
                self._order.predict(self._hand, foresight.again(content.key, life, self.now, horizon))

    def _erase(self, block: int) -> None:
        content = self._content[block]
        if content is not None:
            del self._by_key[content.key]
            self._content[block] = self._lives[block] = None

    def check(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Raise RuntimeError unless every block is accounted for; `held` lists each sequence's blocks."""
        expected = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                expected[block] += 1
        if expected != self._refs:
            wrong = [(b, r, e) for b, (r, e) in enumerate(zip(self._refs, expected, strict=True)) if r != e]
            raise RuntimeError(f"block references differ from their holders (block, counted, held): {wrong[:8]}")
        free = [block for block in range(1, self.num_blocks) if self._refs[block] == 0]
        if len(free) != self.num_free:
            raise RuntimeError(f"{len(free)} blocks are free, {self.num_free} counted")
        if sorted(self._empty) != [block for block in free if self._content[block] is None]:
            raise RuntimeError("the list of empty blocks is not that of the free blocks without content")
        cached = {block: content for block in free if (content := self._content[block]) is not None}
        if len(cached) != self.num_cached:
            raise RuntimeError(f"{len(cached)} free blocks have content, {self.num_cached} counted")
        continued = Counter(content.parent for content in cached.values())
        if continued != self._continued:
            raise RuntimeError("the counts of free blocks that continue a key are wrong")
        self._order.check({block: content.key in continued for block, content in cached.items()})
        for key, block in self._by_key.items():
            content = self._content[block]
            if content is None or content.key != key:
                raise RuntimeError(f"the index points to block {block}, which holds something else")
        if len(self._by_key) != sum(content is not None for content in self._content):
            raise RuntimeError("a block has content that the index does not know")
