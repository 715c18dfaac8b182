"""Rotary embedding in place, queries and keys in one pass where they are neighbours in memory."""

from __future__ import annotations

from torch import Tensor

from ..batch import LayerKV
from ..registry import implements, on
from .kv import kv_write, plain


@implements("rope", "cpu", when=on("cpu"))
def rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """See the reference. Overwrites q and k and returns them."""
    cos, sin = table.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]
    for x in _joined(q, k):
        turned = x[..., : table.shape[1]]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
        new_a = (a * cos).addcmul_(b, sin, value=-1)  # fp32: the table's dtype decides
        new_b = (b * cos).addcmul_(a, sin)
        a.copy_(new_a)
        b.copy_(new_b)
    return q, k


@implements("rope_kv_write", "cpu", when=plain)
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    interleaved: bool,
    cache: LayerKV,
    slot_mapping: Tensor,
) -> Tensor:
    """See the reference. Overwrites q and k."""
    q, k = rope(q, k, positions, table, interleaved)
    kv_write(k, v, cache, slot_mapping)
    return q


def _joined(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """q and k as one tensor of heads if they are slices of one projection with k right behind q, else both."""
    adjacent = q.data_ptr() + q.shape[1] * q.shape[2] * q.element_size() == k.data_ptr()
    if adjacent and q.stride() == k.stride() and q.stride(1) == q.shape[2] and q.stride(0) > q.shape[1] * q.shape[2]:
        return (q.as_strided((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]), q.stride()),)
    return q, k
