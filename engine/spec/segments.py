"""A proposer's batch: some rows of each sequence, which the host knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.batch import SHORT_ROWS, RaggedBatch
from ..transfer import upload


class Segment(NamedTuple):
    """Rows of one sequence.

    start   the index of the first in the sequence: all before it is in the cache
    tokens, positions  of each row; positions None = their indices
    masks   of a tree, bit j = row j is visible; None = each sees those before it
    wanted  the rows whose logits are needed
    """

    table: np.ndarray
    start: int
    tokens: Sequence[int] | np.ndarray
    wanted: Sequence[int]
    positions: Sequence[int] | None = None
    masks: Sequence[int] | None = None


def lay_out(segments: Sequence[Segment], block_size: int, device: torch.device) -> RaggedBatch:
    """The batch of these rows end to end; segments with few rows come first."""
    counts = np.array([len(segment.tokens) for segment in segments])
    starts = np.array([segment.start for segment in segments])
    cu_q = np.zeros(len(segments) + 1, np.int32)
    np.cumsum(counts, out=cu_q[1:])
    seq_lens = starts + counts
    longest = int(seq_lens.max())
    table = np.zeros((len(segments), -(-longest // block_size)), np.int32)
    for row, segment, length in zip(table, segments, seq_lens.tolist(), strict=True):
        blocks = -(-length // block_size)
        row[:blocks] = segment.table[:blocks]

    sequence = np.repeat(np.arange(len(segments)), counts)
    index = np.arange(cu_q[-1]) + np.repeat(starts - cu_q[:-1], counts)
    blocks, offsets = np.divmod(index, block_size)
    positions = index
    masks = np.zeros(len(index) if any(segment.masks is not None for segment in segments) else 0, np.int64)
    if any(segment.positions is not None for segment in segments):
        positions = index.copy()
    for first, segment in zip(cu_q.tolist(), segments, strict=False):
        last = first + len(segment.tokens)
        if segment.positions is not None:
            positions[first:last] = segment.positions
        if segment.masks is not None:
            masks[first:last] = segment.masks
    wanted = [first + row for first, segment in zip(cu_q.tolist(), segments, strict=False) for row in segment.wanted]
    *fields, trees, logit_rows = upload(
        [
            np.concatenate([np.asarray(segment.tokens, np.int64) for segment in segments]),
            positions,
            table[sequence, blocks] * np.int64(block_size) + offsets,
            cu_q,
            seq_lens.astype(np.int32),
            table,
            masks,
            np.array(wanted, np.int64),
        ],
        device,
    )
    return RaggedBatch(
        *fields,
        tree_mask=trees if len(masks) else None,
        logit_rows=logit_rows,
        max_q=int(counts.max()),
        max_seq_len=longest,
        short_seqs=int((counts <= SHORT_ROWS).argmin()) if counts[-1] > SHORT_ROWS else len(segments),
    )
