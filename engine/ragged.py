"""Rows of sequences laid end to end: what a pass over the target's slots and a proposer's pass have in common.

    sequences, rows of each ──lay_out──▶ Layout ──upload, with tokens──▶ batch_of ──▶ RaggedBatch

A sequence's rows follow each other, or they are a tree: then each row has a parent among the rows before it, its
position is that parent's and one, and it sees its ancestors alone. The row of the last real token, which the guesses of
a verification follow, is the root of such a tree; without that row there are as many roots as first guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..kernels.batch import SHORT_ROWS, RaggedBatch

Parents = Sequence[int]  # of each row of a sequence, the row that it follows; -1 = all that is in the cache

NO_TREES: Mapping[int, Parents] = {}


class Layout(NamedTuple):
    """The host's half of a RaggedBatch of T rows of S sequences, but for tokens; see RaggedBatch."""

    positions: np.ndarray  # [T] int64
    slot_mapping: np.ndarray  # [T] int64
    cu_q: np.ndarray  # [S + 1] int32
    seq_lens: np.ndarray  # [S] int32
    block_table: np.ndarray  # [S, B] int32
    tree_mask: np.ndarray  # [T] int64, or [0] when no row belongs to a tree
    sequence: np.ndarray  # [T]: whose row it is
    indices: np.ndarray  # [T]: of its token in the sequence, which a tree's positions are not
    max_q: int
    max_seq_len: int
    short_seqs: int

    @property
    def arrays(self) -> Sequence[np.ndarray]:
        """Those that a batch has on the device."""
        return self[:6]


def lay_out(
    table: np.ndarray,
    owners: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    block_size: int,
    trees: Mapping[int, Parents] = NO_TREES,
) -> Layout:
    """counts[s] rows of each sequence s, whose first is the token of index starts[s] and whose blocks are
    table[owners[s]]. trees: by the number of a sequence, how its rows follow each other."""
    seq_lens = starts + counts
    max_q, longest = int(counts.max()), int(seq_lens.max())
    sequence, indices = np.arange(len(starts)), starts
    cu_q = np.arange(len(starts) + 1, dtype=np.int32)
    if max_q > 1:
        np.cumsum(counts, out=cu_q[1:])
        sequence = np.repeat(sequence, counts)
        indices = np.arange(cu_q[-1]) + np.repeat(starts - cu_q[:-1], counts)
    positions, tree_mask = indices, np.zeros(len(indices) if trees else 0, np.int64)
    if trees:
        positions = indices.copy()
    for s, parents in trees.items():
        rows = slice(cu_q[s], cu_q[s + 1])
        depths, tree_mask[rows] = depths_and_masks(parents)
        positions[rows] = starts[s] + np.array(depths)
    return Layout(
        positions,
        places(table, owners[sequence], indices, block_size),
        cu_q,
        seq_lens.astype(np.int32),
        table[owners, : -(-longest // block_size)],
        tree_mask,
        sequence,
        indices,
        max_q,
        longest,
        len(starts) if max_q <= SHORT_ROWS else int((counts > SHORT_ROWS).argmax()),
    )


def batch_of(layout: Layout, tensors: Sequence[Tensor]) -> RaggedBatch:
    """tensors: on the device the tokens [T], the layout's arrays, and the rows whose logits are needed [L] int64."""
    *fields, tree_mask, logit_rows = tensors
    return RaggedBatch(
        *fields,
        tree_mask=tree_mask if len(tree_mask) else None,
        logit_rows=logit_rows,
        max_q=layout.max_q,
        max_seq_len=layout.max_seq_len,
        short_seqs=layout.short_seqs,
    )


def places(table: np.ndarray, owners: np.ndarray, indices: np.ndarray, block_size: int) -> np.ndarray:
    """Where in the cache the tokens of these indices are [N] int64, in the sequences with the blocks table[owners]."""
    blocks, offsets = np.divmod(indices, block_size)
    return table[owners, blocks] * np.int64(block_size) + offsets


def depths_and_masks(parents: Parents) -> tuple[list[int], list[int]]:
    """Of each row of a tree how many ancestors it has, and its tree_mask: 64 bits in two's complement."""
    depths: list[int] = []
    seen: list[int] = []
    for row, parent in enumerate(parents):
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
        seen.append(1 << row | (seen[parent] if parent >= 0 else 0))
    return depths, [bits - (bits >> 63 << 64) for bits in seen]
