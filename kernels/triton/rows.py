"""Activations in eight bits, by themselves and fused with the norm or the gate that makes them.

A program holds whole rows, or stretches of them where no scale spans the row, in registers: read once, codes and
scales written once. E4M3 needs a GPU of capability 8.9; int8 any.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed import QuantizedRows, RowFormat
from ..registry import implements
from .activation import gated
from .norm import normed, row_tile
from .specialization import Specialization
from .support import on_gpu, rint, to_e4m3

_STRETCH = 2048  # columns of a program where a row may be cut: 16 groups of 128, 16 values per thread
_GROUP = 128  # the only group that is not the whole row


@triton.jit
def codes_and_scales(value, fixed, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, E4M3: tl.constexpr):
    """value [ROWS, COLUMNS] fp32, zeros beyond the row -> its codes, and scales [ROWS, COLUMNS / GROUP] fp32.

    fixed: a pointer to the static scale, or None. Divisions are rounded as the reference's, so that codes are equal.
    """
    LARGEST: tl.constexpr = 448.0 if E4M3 else 127.0
    groups = tl.reshape(value, (ROWS, COLUMNS // GROUP, GROUP))
    if fixed is None:
        scale = tl.div_rn(tl.max(tl.abs(groups), axis=2), LARGEST)
        scale = tl.where(scale > 0, scale, 1.0)
    else:
        scale = tl.zeros((ROWS, COLUMNS // GROUP), tl.float32) + tl.load(fixed)
    ratio = tl.reshape(tl.div_rn(groups, scale[:, :, None]), (ROWS, COLUMNS))
    if E4M3:
        codes = to_e4m3(ratio)
    else:
        codes = rint(tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)).to(tl.int8)
    return codes, scale


@triton.jit
def _store(
    value,
    codes,
    scales,
    fixed,
    row,
    part,
    rows,
    d,
    groups,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Quantize value [ROWS, COLUMNS], the part-th stretch of the rows `row` [ROWS] of d columns."""
    coded, scale = codes_and_scales(value, fixed, ROWS, COLUMNS, GROUP, codes.dtype.element_ty != tl.int8)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    tl.store(codes + row[:, None] * d + column[None, :], coded, mask=inside)
    # Of stretches that share a row's one scale, the first writes it.
    group = part * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    present = (row < rows)[:, None] & (group < groups)[None, :]
    tl.store(scales + row[:, None] * groups + group[None, :], scale, mask=present)


@triton.jit(do_not_specialize=["rows"])
def _quantize(
    x, codes, scales, fixed, rows, d, groups, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    _store(value, codes, scales, fixed, row, part, rows, d, groups, ROWS, COLUMNS, GROUP)


@triton.jit(do_not_specialize=["rows"])
def _norm_quantize(
    x,
    residual,
    weight,
    codes,
    scales,
    fixed,
    rows,
    d,
    groups,
    x_stride,
    residual_stride,
    eps,
    offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """With a residual, x + residual goes there and is normed; else x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + row[:, None] * residual_stride + column[None, :]
        total = (value + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, total, mask=inside)
        value = total.to(tl.float32)
    gain = tl.load(weight + column, mask=column < d, other=0.0, eviction_policy="evict_last")
    value = normed(value, gain, eps, offset, d)
    # Beyond the row value is 0 and so is its norm, whatever weight and offset are there.
    _store(value, codes, scales, fixed, row, 0, rows, d, groups, ROWS, COLUMNS, GROUP)


@triton.jit(do_not_specialize=["rows"])
def _gate_quantize(
    x,
    codes,
    scales,
    fixed,
    rows,
    f,
    groups,
    x_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < f)[None, :]
    start = x + row[:, None] * x_stride + column[None, :]
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + f, mask=inside, other=0.0).to(tl.float32)
    _store(gated(gate, up, ACTIVATION), codes, scales, fixed, row, part, rows, f, groups, ROWS, COLUMNS, GROUP)


def _tile(width: int, group: int, whole: bool) -> tuple[dict[str, int], int]:
    """(ROWS, COLUMNS, GROUP; warps) of a program; whole: it must hold whole rows."""
    held = width if whole else min(width, _STRETCH)
    rows, columns, warps = row_tile(max(held, group))
    return {"ROWS": rows, "COLUMNS": columns, "GROUP": group or columns}, warps


def _empty(x: Tensor, width: int, to: RowFormat) -> QuantizedRows:
    """ValueError for a group that no kernel has."""
    if to.group not in (0, _GROUP):
        raise ValueError(f"RowFormat.group is {to.group}; rows are quantized whole (0) or in groups of {_GROUP}")
    groups = triton.cdiv(width, to.group) if to.group else 1
    return QuantizedRows(
        torch.empty(x.shape[0], width, dtype=to.codes, device=x.device),
        torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device),
        x.dtype,
    )


@implements("quantize_rows", "triton", when=on_gpu)
def quantize_rows(x: Tensor, to: RowFormat) -> QuantizedRows:
    """See the reference. Rows may be strided."""
    rows, d = x.shape
    out = _empty(x, d, to)
    if rows:
        tile, warps = _tile(d, to.group, whole=to.scale is None and not to.group)
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(d, tile["COLUMNS"]))
        _quantize[grid](
            x, out.codes, out.scales, to.scale, rows, d, out.scales.shape[1], x.stride(0), **tile, num_warps=warps
        )
    return out


def _norm_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, to: RowFormat
) -> QuantizedRows:
    rows, d = x.shape
    out = _empty(x, d, to)
    if rows:
        tile, warps = _tile(d, to.group, whole=True)
        _norm_quantize[(triton.cdiv(rows, tile["ROWS"]),)](
            x,
            residual,
            weight,
            out.codes,
            out.scales,
            to.scale,
            rows,
            d,
            out.scales.shape[1],
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            offset,
            **tile,
            num_warps=warps,
        )
    return out


@implements("rms_norm_rows", "triton", when=on_gpu)
def rms_norm_rows(x: Tensor, weight: Tensor, eps: float, offset: float, to: RowFormat) -> QuantizedRows:
    """See the reference. Rows may be strided."""
    return _norm_rows(x, None, weight, eps, offset, to)


@implements("add_rms_norm_rows", "triton", when=on_gpu)
def add_rms_norm_rows(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, to: RowFormat
) -> tuple[QuantizedRows, Tensor]:
    """See the reference. The sum is left in residual; rows may be strided."""
    return _norm_rows(x, residual, weight, eps, offset, to), residual


def _gate_rows(x: Tensor, activation: str, to: RowFormat) -> QuantizedRows:
    rows, f = x.shape[0], x.shape[1] // 2
    out = _empty(x, f, to)
    if rows:
        tile, warps = _tile(f, to.group, whole=to.scale is None and not to.group)
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(f, tile["COLUMNS"]))
        _gate_quantize[grid](
            x,
            out.codes,
            out.scales,
            to.scale,
            rows,
            f,
            out.scales.shape[1],
            x.stride(0),
            ACTIVATION=activation,
            **tile,
            num_warps=warps,
        )
    return out


@implements("silu_and_mul_rows", "triton", when=on_gpu)
def silu_and_mul_rows(x: Tensor, to: RowFormat) -> QuantizedRows:
    """See the reference. Rows may be strided."""
    return _gate_rows(x, "silu", to)


@implements("gelu_and_mul_rows", "triton", when=on_gpu)
def gelu_and_mul_rows(x: Tensor, to: RowFormat) -> QuantizedRows:
    """See the reference. Rows may be strided."""
    return _gate_rows(x, "gelu", to)


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: both codes, whole rows and groups, the widest rows of usual models."""
    forms = []
    for codes, arches in (("*i8:16", (80, 90, 100)), ("*fp8e4nv:16", (90, 100))):
        out = {"codes": codes, "scales": "*fp32:16", "rows": "i32", "x_stride": "i32:16"}
        for group in (0, _GROUP):
            groups: dict[str, str] = {"groups": "i32"} if group else {}
            constants = {"fixed": None} | ({} if group else {"groups": 1})
            name = f"{'int8' if codes == '*i8:16' else 'e4m3'}/{'groups' if group else 'rows'}"
            kinds = (
                ("norm", _norm_quantize, 8192, {"d": "i32:16", "eps": "fp32", "offset": "fp32", "weight": "*bf16:16"}),
                ("gate", _gate_quantize, 14336, {"f": "i32:16"}),
                ("gate_wide", _gate_quantize, 28672, {"f": "i32:16"}),
                ("plain", _quantize, 8192, {"d": "i32:16"}),
            )
            for kind, kernel, width, more in kinds:
                tile, warps = _tile(width, group, whole=kind == "norm" or not group)
                more = more | ({"residual": "*bf16:16", "residual_stride": "i32:16"} if kind == "norm" else {})
                extra = {"ACTIVATION": "silu"} if "gate" in kind else {}
                forms.append(
                    Specialization(
                        name=f"{kind}/{name}",
                        kernel=kernel,
                        signature={"x": "*bf16:16"} | out | groups | more,
                        constexprs=constants | tile | extra,
                        num_warps=warps,
                        arches=arches,
                        needs=("wide",),
                    )
                )
    return forms
