"""Rows of a table by their numbers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..registry import op


@op
def embed(ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """table[ids] · scale, rounded once; a scale of 1 copies. ids [T] int64, table [V, d] -> [T, d] in its dtype.

    IndexError for an id outside of 0 .. V-1 on a CPU; a GPU reports it as its own error later.
    """
    rows = _rows(ids, table, "ids", "embeddings")
    return rows if scale == 1.0 else rows * scale


@op
def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], as a copy: x [T, d], rows [L] int64 -> [L, d].

    IndexError for a row outside of 0 .. T-1 on a CPU; a GPU reports it as its own error later.
    """
    return _rows(rows, x, "rows", "rows")


def _rows(ids: Tensor, table: Tensor, what: str, of: str) -> Tensor:
    try:
        return F.embedding(ids, table)
    except IndexError as error:
        raise outside(ids, table, what, of) from error


def outside(ids: Tensor, table: Tensor, what: str, of: str) -> IndexError:
    """The error for ids that a table lacks."""
    low, high = (int(bound) for bound in ids.aminmax())
    return IndexError(f"{what} {low} .. {high} are not all among the {len(table)} {of}")
