"""RMS norms: a program holds whole rows in registers, so that each is read once and its sum never depends on T."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .specialization import Specialization
from .support import on_gpu

# Elements of a program at least: eight bf16 (one 128-bit load) for each of 128 threads. Also more than its threads, so
# that no value lives in two of them and writing over the inputs is safe.
_TILE = 1024


def row_tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program that holds rows of `width` columns; of the width alone."""
    columns = max(16, triton.next_power_of_2(width))
    rows = max(1, _TILE // columns)
    # 32 values per thread: four loads in flight each, few warps to sum over, and no spills with one operand more.
    return rows, columns, min(max(rows * columns // 1024, 4), 32)


@triton.jit
def normed(x, weight, eps, offset, d):
    """x / sqrt(mean(x²) + eps) · (weight + offset): x [rows, columns] fp32 with zeros beyond d, weight [columns]."""
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / d + eps)
    return x * scale[:, None] * (weight.to(tl.float32) + offset)[None, :]


@triton.jit(do_not_specialize=["rows"])  # one compiled form for every number of tokens
def _norm(
    x,
    residual,
    weight,
    out,
    rows,
    inner,
    d,
    x_outer,
    x_inner,
    residual_stride,
    out_stride,
    eps,
    offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of x [rows / inner, inner, d] -> out [rows, d]; with a residual, x + residual goes there and is normed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    row = row.to(tl.int64)
    start = (row // inner) * x_outer + (row % inner) * x_inner
    value = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + row[:, None] * residual_stride + column[None, :]
        total = (value + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, total, mask=inside)
        value = total.to(tl.float32)
    # Every program reads the weight: it stays in the cache when rows pass through.
    gain = tl.load(weight + column, mask=column < d, other=0.0, eviction_policy="evict_last")
    result = normed(value, gain, eps, offset, d)
    tl.store(out + row[:, None] * out_stride + column[None, :], result.to(out.dtype.element_ty), mask=inside)


@implements("rms_norm", "triton", when=on_gpu)
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """See the reference. The last dimension is contiguous; a 3-d view may have any strides before it."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    d = x.shape[-1]
    if x.dim() == 3 and x.stride(0) != x.shape[1] * x.stride(1):  # heads of a joined qkv
        inner, outer_stride, inner_stride = x.shape[1], x.stride(0), x.stride(1)
    else:
        x = x.reshape(-1, d)
        inner, outer_stride, inner_stride = 1, x.stride(0), 0
    rows = x.numel() // d
    tile_rows, columns, warps = row_tile(d)
    _norm[(triton.cdiv(rows, tile_rows),)](
        x,
        None,
        weight,
        out,
        rows,
        inner,
        d,
        outer_stride,
        inner_stride,
        0,
        d,
        eps,
        offset,
        ROWS=tile_rows,
        COLUMNS=columns,
        num_warps=warps,
    )
    return out


@implements("add_rms_norm", "triton", when=on_gpu)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """See the reference. The norm is left in x, the sum in residual; their rows may be strided."""
    rows, d = x.shape
    if rows:
        tile_rows, columns, warps = row_tile(d)
        _norm[(triton.cdiv(rows, tile_rows),)](
            x,
            residual,
            weight,
            x,
            rows,
            1,
            d,
            x.stride(0),
            0,
            residual.stride(0),
            x.stride(0),
            eps,
            offset,
            ROWS=tile_rows,
            COLUMNS=columns,
            num_warps=warps,
        )
    return x, residual


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: heads of 128, and hidden sizes with a residual."""
    forms = []
    for d in (128, 896, 4096, 8192):
        rows, columns, warps = row_tile(d)
        heads = d == 128
        tensors = {"x": "*bf16:16", "weight": "*bf16:16", "out": "*bf16:16"}
        sizes = {"rows": "i32", "d": "i32:16", "x_outer": "i32:16", "out_stride": "i32:16"}
        scalars = {"eps": "fp32", "offset": "fp32"}
        extra = {"inner": "i32", "x_inner": "i32:16", "residual_stride": "i32:16"} if heads else {}
        extra |= {} if heads else {"residual": "*bf16:16", "x_inner": "i32:16", "residual_stride": "i32:16"}
        constants = {"residual": None} if heads else {"inner": 1}
        forms.append(
            Specialization(
                name=f"{'heads' if heads else 'add'}/d{d}",
                kernel=_norm,
                signature=tensors | sizes | scalars | extra,
                constexprs=constants | {"ROWS": rows, "COLUMNS": columns},
                num_warps=warps,
                needs=("wide",),
            )
        )
    return forms
