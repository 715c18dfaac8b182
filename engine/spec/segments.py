"""A proposer's batch: some rows of each sequence, which the host knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.batch import RaggedBatch
from ..ragged import Parents, batch_of, lay_out
from ..transfer import upload


class Segment(NamedTuple):
    """Rows of one sequence.

    table    its KV blocks, room for these rows included
    start    the index of the first in the sequence: all before it is in the cache
    tokens   of each row
    wanted   the rows whose logits are needed
    parents  of a tree's rows, see ragged.py; None = they follow each other
    """

    table: np.ndarray
    start: int
    tokens: Sequence[int] | np.ndarray
    wanted: Sequence[int]
    parents: Parents | None = None


def gather(segments: Sequence[Segment], block_size: int, device: torch.device) -> RaggedBatch:
    """The batch of these rows end to end; segments with few rows come first."""
    counts = np.array([len(segment.tokens) for segment in segments])
    starts = np.array([segment.start for segment in segments])
    table = np.zeros((len(segments), -(-int((starts + counts).max()) // block_size)), np.int32)
    for row, segment in zip(table, segments, strict=True):
        blocks = segment.table[: len(row)]
        row[: len(blocks)] = blocks
    trees = {i: segment.parents for i, segment in enumerate(segments) if segment.parents is not None}
    layout = lay_out(table, np.arange(len(segments)), starts, counts, block_size, trees)
    tokens = np.concatenate([np.asarray(segment.tokens, np.int64) for segment in segments])
    wanted = [first + row for first, one in zip(layout.cu_q.tolist(), segments, strict=False) for row in one.wanted]
    return batch_of(layout, upload([tokens, *layout.arrays, np.array(wanted, np.int64)], device))
