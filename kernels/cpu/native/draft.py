"""Draws of drafted children; see src/draft.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import implements
from .library import Kernel
from .sampling import usable

_draw_children = Kernel("draw_children", "ipii" + "pppp" + "pp")


@implements("draw_children", "native", when=usable)
def draw_children(
    q: Tensor, count: int, seeds: Tensor, sample_index: Tensor, positions: Tensor, nodes: Tensor
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    rows, vocab = q.shape
    if not 1 <= count <= vocab:
        raise ValueError(f"draw_children: {count} of {vocab} tokens cannot be drawn")
    # Kept, so that what a copy owns outlives the call.
    columns = [x.contiguous() for x in (q, seeds, sample_index, positions, nodes)]
    tokens = torch.empty(rows, count, dtype=torch.int64)
    keys = torch.empty(rows, count)
    start, *rest = [column.data_ptr() for column in columns]
    # A row is one thread's work: another takes as long to wake up as this one to go through eight small ones.
    threads = 1 if rows * vocab <= 1 << 15 else None
    _draw_children(rows, start, vocab, count, *rest, tokens.data_ptr(), keys.data_ptr(), threads=threads)
    return tokens, keys
