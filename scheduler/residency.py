"""Who is in the batch: slots, blocks, and the computed prompts that are held for samples to come.

A running request holds a slot and blocks for all its known tokens. A group holds its prompt's blocks, once they are
computed, until its last sample has begun or somebody needs the memory. Nothing here decides who that is.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import NamedTuple

from .block_pool import BlockPool
from .config import SchedulerConfig
from .plan import NewSeq
from .prefix import PrefixCache
from .request import Group, Request

# Share of the blocks kept free at admission, so that running requests can grow before the next preemption
# (the value of the Sarathi-Serve scheduler).
WATERMARK = 0.01


class Entry(NamedTuple):
    """copy: (source block, destination block) to be copied before the sequence runs, or None."""

    sequence: NewSeq
    copy: tuple[int, int] | None


class Residency:
    def __init__(self, config: SchedulerConfig) -> None:
        self.pool = BlockPool(config.num_blocks, config.eviction)
        self.prefix = PrefixCache(self.pool, config.block_size, enabled=config.prefix_caching)
        self.running: list[Request] = []  # by time of entering
        self.pinned: dict[Group, None] = {}  # groups with a prefix, the first pinned first
        self.free_slots = [*range(config.max_num_seqs - 1, -1, -1)]
        self.freed: list[int] = []  # slots that the runner has not heard of yet
        self.forgotten: list[int] = []  # keys of kept logits that the runner has not heard of yet
        self._config = config
        self._size = config.block_size

    def has_room(self, num_blocks: int) -> bool:
        """Whether a request that needs so many fresh blocks may enter now."""
        watermark = self._watermark() if self.running else 0
        return bool(self.free_slots) and self.pool.num_free >= num_blocks + watermark

    def enter(self, request: Request, make_room: Callable[[int], bool]) -> Entry | None:
        """Give a waiting request a slot and blocks for all its tokens; None, and no change, if they are not there.

        make_room(number of blocks): whether there is room, if need be after somebody else has left.
        """
        group, forks = request.group, request.forks
        full, rest = divmod(request.num_prompt, self._size)
        copied = group.prefix[full] if forks and rest else None
        shared = self.prefix.match(request)
        num_tokens = request.num_tokens + (forks and request.params.max_tokens > 1)  # the one that it draws at once
        needed = -(-num_tokens // self._size) - len(shared)
        for block in shared:
            self.pool.share(block)
        if not make_room(needed):
            self.pool.release(reversed(shared))
            return None
        fresh = self.pool.take(needed) or []
        request.block_ids = shared + fresh
        request.num_computed = request.num_found = request.num_prompt if forks else len(shared) * self._size
        request.num_published = len(shared)
        request.slot = self.free_slots.pop()
        request.passed_over = 0
        self.running.append(request)
        self.prefix.promise(request)
        sequence = NewSeq(
            request.slot,
            tuple(request.token_ids),
            request.num_prompt,
            request.params,
            request.index,
            tuple(request.block_ids),
            group.salt,
        )
        return Entry(sequence, None if copied is None else (copied, fresh[0]))

    def grow(self, request: Request) -> tuple[int, ...] | None:
        """The block that the request's newest token needs, if it needs one; None if there is none to be had."""
        if not self.is_full(request):
            return ()
        blocks = self.pool.take(1)
        if blocks is None:
            return None
        request.block_ids += blocks
        return tuple(blocks)

    def has_room_ahead(self, request: Request, nodes: int) -> bool:
        """Whether blocks can be spared for so many guesses behind its newest token.

        Kept are the watermark, and a block for every sequence that runs: nobody is preempted for guesses, in this step
        or the next.
        """
        needed = self._lacks(request, nodes)
        return needed <= 0 or self.pool.num_free >= needed + self._watermark() + len(self.running)

    def grow_ahead(self, request: Request, nodes: int) -> tuple[int, ...]:
        """These blocks. What is not needed in the end stays with the request."""
        blocks = self.pool.take(max(self._lacks(request, nodes), 0)) or []
        request.block_ids += blocks
        return tuple(blocks)

    def is_full(self, request: Request) -> bool:
        """Whether its newest token needs one more block."""
        return request.num_tokens > len(request.block_ids) * self._size

    def leave(self, request: Request) -> None:
        """Give back slot and blocks. The blocks are free but stay findable."""
        self.prefix.withdraw(request, request.num_promised)
        self.running.remove(request)
        self.pool.release(reversed(request.block_ids))
        request.block_ids = []
        self.freed.append(request.slot)
        self.free_slots.append(request.slot)
        request.slot = -1

    def pin(self, request: Request) -> None:
        """Hold the prompt that `request` has just computed for the samples to come."""
        group = request.group
        group.prefix = request.block_ids[: -(-request.num_prompt // self._size)]
        for block in group.prefix:
            self.pool.share(block)
        self.pinned[group] = None

    def unpin(self, group: Group) -> None:
        """Let a pinned prompt go. A sample still to come computes it again, or finds it in the cache."""
        if group.prefix:
            self.pool.release(reversed(group.prefix))
            group.prefix = []
            del self.pinned[group]
            self.forgotten.append(group.key)

    def unpin_one(self, spared: Container[Group]) -> bool:
        """Let go of the longest pinned prompt that is not of `spared`; False if there is none."""
        group = next((group for group in self.pinned if group not in spared), None)
        if group is not None:
            self.unpin(group)
        return group is not None

    def _lacks(self, request: Request, nodes: int) -> int:
        return -(-(request.num_tokens + nodes) // self._size) - len(request.block_ids)

    def _watermark(self) -> int:
        return int(WATERMARK * self._config.num_blocks)

    def check(self) -> None:
        """Raise RuntimeError unless every block and slot is accounted for."""
        self.pool.check([*(request.block_ids for request in self.running), *(group.prefix for group in self.pinned)])
        slots = sorted([*self.free_slots, *(request.slot for request in self.running)])
        if slots != list(range(self._config.max_num_seqs)):
            raise RuntimeError(f"slots are lost or doubled: {slots}")
        for request in self.running:
            if not request.num_published * self._size <= request.num_computed <= request.num_tokens:
                raise RuntimeError(f"counters of {request.request_id} are out of order: {request}")
