"""Rows of a table by their numbers: one copy each."""

from __future__ import annotations

from torch import Tensor

from ...reference.embedding import outside
from ...registry import implements
from .library import DTYPES, Kernel, usable

_gather = Kernel("gather", "iipiipfp")


@implements("embed", "native", when=usable)
def embed(ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """See the reference."""
    return _rows(ids, table, scale, "ids", "embeddings")


@implements("take_rows", "native", when=usable)
def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """See the reference."""
    return _rows(rows, x, 1.0, "rows", "rows")


def _rows(ids: Tensor, table: Tensor, scale: float, what: str, of: str) -> Tensor:
    count, (height, width) = ids.shape[0], table.shape
    ids, table = ids.contiguous(), table.contiguous()
    out = table.new_empty((count, width))
    status = _gather(
        count,
        DTYPES[table.dtype],
        table.data_ptr(),
        height,
        width,
        ids.data_ptr(),
        scale,
        out.data_ptr(),
    )
    if status:
        raise outside(ids, table, what, of)
    return out
