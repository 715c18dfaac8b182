"""Which sequences of a step begin with the same blocks, so that attention reads those once for all of them.

    block_table ─▶ by first blocks ─▶ all that they have in common ─▶ what branches off there, if that saves more

Samples of one prompt, users of one system prompt and turns of one conversation look alike here: equal block ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batch import SharedPrefix

# Time of attention apart over shared (bench/shared_prefix.py: 14 query and 2 KV heads of 64, bf16 with AMX, suffix 32):
#   sequences x keys      2 x 512   2 x 1024   3 x 512   5 x 256   8 x 256   64 x 128   64 x 512   64 x 2048
#   one thread               1.23       1.31                           1.56       1.44       2.18        2.98
#   two threads              0.87       1.24      1.25      0.92                             1.92        2.60
# Two threads wait for each other once more, which a group has to earn; below MIN_KEYS the search costs what it saves.
MIN_KEYS = 256
MIN_SAVED = 1024  # keys that are not read again
MAX_ROWS = 16  # of a sequence: more fill matrix tiles by themselves
LEVELS = 4  # branchings that are looked into, which bounds the search whatever the prompts are

Ints = NDArray[np.intp]


def find_shared_prefixes(
    block_table: NDArray[np.int32], num_rows: NDArray[Any], contexts: NDArray[Any], block_size: int
) -> tuple[SharedPrefix, ...]:
    """Groups of sequences with equal leading blocks, disjoint, each with all the blocks that its members share.

    block_table [S, B]; num_rows [S]: rows in this step; contexts [S]: keys before them, at most B * block_size.
    A prefix ends with the last full block before its members' rows. Of a tree of prefixes, a sequence is in the group
    that saves more: a deep one of few, or a shallow one of many. For 64 sequences it takes 10 µs where nothing is
    shared, 45 µs where all are one group, 200 µs in a tree of 60 branchings.
    """
    if len(block_table) < 2:
        return ()
    full, least = contexts // block_size, -(-MIN_KEYS // block_size)
    able = np.flatnonzero((num_rows > 0) & (num_rows <= MAX_ROWS) & (full >= least))
    if len(able) < 2 or len(set(block_table[able, least - 1].tolist())) == len(able):
        return ()
    by_beginning: dict[bytes, list[int]] = {}
    for seq, blocks in zip(able.tolist(), block_table[able, :least], strict=True):
        by_beginning.setdefault(blocks.tobytes(), []).append(seq)
    search = _Search(block_table, full, -(-MIN_SAVED // block_size))
    groups = [group for seqs in _several(by_beginning) for group in search.groups(seqs, LEVELS)]
    return tuple(SharedPrefix(tuple(seqs.tolist()), depth) for seqs, depth in groups)


def _several(by_blocks: Mapping[Any, list[int]]) -> list[Ints]:
    return [np.array(seqs) for seqs in by_blocks.values() if len(seqs) > 1]


@dataclass(frozen=True, slots=True)
class _Search:
    """A tree of prefixes: a node is two or more sequences that have their first `depth` blocks in common."""

    table: NDArray[np.int32]  # [S, B]
    full: NDArray[Any]  # [S]: blocks before the rows of this step
    min_saved: int  # blocks

    def groups(self, seqs: Ints, levels: int) -> list[tuple[Ints, int]]:
        """The groups of a node, (members, depth): those of its branches that save more, and the rest together."""
        depth = self.common(seqs)
        found = []
        for branch in self.branches(seqs, depth) if levels else ():
            staying = len(branch) * depth  # blocks that these save here
            if (len(branch) - 1) * int(self.full[branch].max()) <= staying:
                continue
            deeper = self.groups(branch, levels - 1)
            if sum((len(members) - 1) * length for members, length in deeper) > staying:
                found += deeper
                seqs = np.setdiff1d(seqs, branch, assume_unique=True)
        if (len(seqs) - 1) * depth >= self.min_saved:
            found.append((seqs, depth))
        return found

    def common(self, seqs: Ints) -> int:
        """Leading full blocks that all of them have."""
        end = int(self.full[seqs].min())
        blocks = self.table[seqs, :end]
        unequal = (blocks[1:] != blocks[0]).any(axis=0)
        return int(unequal.argmax()) if unequal.any() else end

    def branches(self, seqs: Ints, depth: int) -> list[Ints]:
        """The sequences by their block at a depth, where two or more have the same."""
        by_block: dict[int, list[int]] = {}
        longer = seqs[self.full[seqs] > depth]
        for seq, block in zip(longer.tolist(), self.table[longer, depth].tolist(), strict=True):
            by_block.setdefault(block, []).append(seq)
        return _several(by_block)
