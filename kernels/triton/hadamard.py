"""The Hadamard rotation of heads, by butterflies between registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.hadamard import is_power_of_two
from ..registry import implements
from .specialization import Specialization
from .support import on_gpu

_TILE = 2048  # entries of a program: 16 per thread of four warps


@triton.jit
def rotated(x, ROWS: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """x [ROWS, SIZE] fp32 · H / √SIZE, SIZE = 2^STAGES.

    Every stage adds and subtracts neighbours and puts the sums before the differences, which turns the index by one
    bit: after all of them it is as it was, and the sums are the reference's, in its order.
    """
    for _ in tl.static_range(STAGES):
        a, b = tl.split(tl.reshape(x, [ROWS, SIZE // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS, SIZE])
    return x * (1.0 / SIZE**0.5)


@triton.jit(do_not_specialize=("count",))
def _hadamard(
    x,
    out,
    count,
    row_stride,
    head_stride,
    heads,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ROWS of `count` heads, `heads` of them in each row of x; out is contiguous."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (index < count)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    source = (index // heads * row_stride + index % heads * head_stride)[:, None] + columns
    turned = rotated(tl.load(x + source, mask=there, other=0.0).to(tl.float32), ROWS, SIZE, STAGES)
    tl.store(out + index[:, None] * SIZE + columns, turned.to(out.dtype.element_ty), mask=there)


@implements("hadamard", "triton", when=on_gpu)
def hadamard(x: Tensor) -> Tensor:
    """See the reference."""
    size = x.shape[-1]
    if not is_power_of_two(size):
        raise ValueError(f"the rotation needs a power of two, the last dimension is {size}")
    # Heads of a slice of a joined projection lie apart by row; other views are copied.
    heads = x if x.dim() == 3 and x.stride(2) == 1 else x.contiguous().view(-1, 1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = out.numel() // size
    if count:
        rows = max(1, min(_TILE // size, triton.next_power_of_2(count)))
        _hadamard[(triton.cdiv(count, rows),)](
            heads, out, count, heads.stride(0), heads.stride(1), heads.shape[1], rows, size, size.bit_length() - 1
        )
    return out


def specializations() -> list[Specialization]:
    """The queries of int4 caches."""
    return [
        Specialization(
            name=f"d{size}",
            kernel=_hadamard,
            signature={"x": "*bf16:16", "out": "*bf16:16", "count": "i32", "row_stride": "i32:16"}
            | {"head_stride": "i32:16", "heads": "i32:16"},
            constexprs={"ROWS": _TILE // size, "SIZE": size, "STAGES": size.bit_length() - 1},
            needs=("wide",),
        )
        for size in (64, 128)
    ]
