"""Norms, rotation and gated activations: one pass over the rows each, in place where that is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import implements
from .library import DTYPES, Kernel, usable

_norm = Kernel("norm", "iiipiiiippffp")
_rope = Kernel("rope", "iippiiiiiiippiii")
_gate = Kernel("gate", "iipiipi")
_add_residual = Kernel("add_residual", "iippi")
_add_gated = Kernel("add_gated", "iipppi")


@implements("rms_norm", "native", when=usable)
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """See the reference."""
    if x.dim() > 3 or x.stride(-1) != 1:
        return rms_norm(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps, offset).view(x.shape)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    sizes, strides = x.shape, x.stride()
    per_head = len(sizes) == 3
    _norm(
        sizes[0] if len(sizes) > 1 else 1,
        DTYPES[x.dtype],
        DTYPES[weight.dtype],
        x.data_ptr(),
        sizes[1] if per_head else 1,
        strides[0],
        strides[1] if per_head else 0,
        sizes[-1],
        0,
        weight.data_ptr(),
        eps,
        offset,
        out.data_ptr(),
    )
    return out


@implements("add_rms_norm", "native", when=usable)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """See the reference. The sum overwrites residual, the norm x, where they lie together."""
    x, residual = x.contiguous(), residual.contiguous()
    count, dim = x.shape
    _norm(
        count,
        DTYPES[x.dtype],
        DTYPES[weight.dtype],
        x.data_ptr(),
        1,
        dim,
        0,
        dim,
        residual.data_ptr(),
        weight.data_ptr(),
        eps,
        offset,
        x.data_ptr(),
    )
    return x, residual


@implements("rope", "native", when=usable)
def rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """See the reference. Overwrites q and k and returns them. IndexError for a position that the table lacks."""
    rows, q_heads, dim = q.shape
    q_row, q_head, _ = q.stride()
    k_row, k_head, _ = k.stride()
    status = _rope(
        rows,
        DTYPES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        q_heads,
        k.shape[1],
        q_row,
        q_head,
        k_row,
        k_head,
        dim,
        positions.data_ptr(),
        table.data_ptr(),
        *table.shape,
        interleaved,
    )
    if status:
        raise IndexError(f"positions {positions.aminmax()} are outside of the rope table of {table.shape[0]} rows")
    return q, k


def _gated(x: Tensor, gelu: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, width))
    _gate(rows, DTYPES[x.dtype], x.data_ptr(), x.stride(0), width, out.data_ptr(), gelu)
    return out


@implements("silu_and_mul", "native", when=usable)
def silu_and_mul(x: Tensor) -> Tensor:
    """See the reference."""
    return _gated(x, gelu=False)


@implements("gelu_and_mul", "native", when=usable)
def gelu_and_mul(x: Tensor) -> Tensor:
    """See the reference."""
    return _gated(x, gelu=True)


@implements("add_residual", "native", when=usable)
def add_residual(x: Tensor, residual: Tensor) -> Tensor:
    """See the reference. The sum overwrites x where it lies together."""
    x, residual = x.contiguous(), residual.contiguous()
    rows, width = x.shape
    _add_residual(rows, DTYPES[x.dtype], x.data_ptr(), residual.data_ptr(), width)
    return x


@implements("add_gated", "native", when=usable)
def add_gated(out: Tensor, gate: Tensor, expert: Tensor) -> Tensor:
    """See the reference. The sum overwrites out where it lies together."""
    out, gate, expert = out.contiguous(), gate.contiguous(), expert.contiguous()
    rows, width = out.shape
    _add_gated(rows, DTYPES[out.dtype], out.data_ptr(), gate.data_ptr(), expert.data_ptr(), width)
    return out
