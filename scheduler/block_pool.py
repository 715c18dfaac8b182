"""Who owns which KV block.

A block is held (refs > 0), or free. Free blocks stand in a linked list in the order in which they will be handed out:
those without content first, then the least recently used. A free block with a key keeps its content until it is handed
out again, so a later prompt can still share it. Block 0 is the null block: never handed out, padding is written there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class BlockContent(NamedTuple):
    """What a published block holds. Equal keys are believed only if this is equal too."""

    key: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}: at least 2 are needed, the null block and one to use")
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self.num_cached = 0  # free blocks that have content
        self._refs = [0] * num_blocks
        self._content: list[BlockContent | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        # The null block is the list's sentinel: after it comes the first to be handed out, before it the last.
        self._next = [*range(1, num_blocks), 0]
        self._prev = [num_blocks - 1, *range(num_blocks - 1)]

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def take(self, count: int) -> list[int] | None:
        """`count` blocks to write into, each with one holder; None, and no change, when there are not as many."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            block = self._next[0]
            self._unlink(block)
            self.num_cached -= self._content[block] is not None
            self._erase(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, block: int) -> None:
        """One more holder of a block that is held, or is free with content."""
        if self._refs[block] == 0:
            self._unlink(block)
            self.num_cached -= 1
        self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less of each. Give a sequence's blocks last first, so that its tail is reused before its head."""
        for block in blocks:
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._link(block)
                self.num_cached += self._content[block] is not None

    def publish(self, block: int, content: BlockContent) -> None:
        """Offer a full, held block for sharing. The first block of a key stays the one that is found."""
        if content.key not in self._by_key:
            self._by_key[content.key] = block
            self._content[block] = content

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

    def check(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Raise RuntimeError unless every block is accounted for; `held` lists each sequence's blocks."""
        expected = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                expected[block] += 1
        if expected != self._refs:
            wrong = [(b, r, e) for b, (r, e) in enumerate(zip(self._refs, expected, strict=True)) if r != e]
            raise RuntimeError(f"block references differ from their holders (block, counted, held): {wrong[:8]}")
        free, block = [], self._next[0]
        while block != 0:
            if self._prev[self._next[block]] != block:
                raise RuntimeError(f"the free list is broken at block {block}")
            free.append(block)
            block = self._next[block]
            if len(free) > self.num_blocks:
                raise RuntimeError("the free list has a cycle")
        if sorted(free) != [b for b in range(1, self.num_blocks) if self._refs[b] == 0] or len(free) != self.num_free:
            raise RuntimeError(f"{len(free)} blocks in the free list, {self.num_free} counted")
        if self.num_cached != sum(self._content[b] is not None for b in free):
            raise RuntimeError(f"{self.num_cached} cached blocks counted, others found")
        for key, block in self._by_key.items():
            content = self._content[block]
            if content is None or content.key != key:
                raise RuntimeError(f"the index points to block {block}, which holds something else")
        if len(self._by_key) != sum(c is not None for c in self._content):
            raise RuntimeError("a block has content that the index does not know")

    def _erase(self, block: int) -> None:
        content = self._content[block]
        if content is not None:
            del self._by_key[content.key]
            self._content[block] = None

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self.num_free -= 1

    def _link(self, block: int) -> None:
        """Into the free list: at its end if the content may be wanted again, else at its front."""
        before = self._prev[0] if self._content[block] is not None else 0
        after = self._next[before]
        self._next[before] = self._prev[after] = block
        self._prev[block], self._next[block] = before, after
        self.num_free += 1
