"""Activations in eight bits, by themselves and together with what makes them (norms, gated activations)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed import QuantizedRows, RowFormat
from ..registry import op
from .activation import gelu_and_mul, silu_and_mul
from .norm import rms_norm

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@op
def quantize_rows(x: Tensor, to: RowFormat) -> QuantizedRows:
    """x [T, K] as codes and scales: scale = max |x| / the largest code, per row and group, or the format's fixed one.

    To nearest even (of fp8: of its own grid), clamped to ±127 or ±448. A group of zeros has the scale 1,
    and on a CPU one with a NaN has the scale NaN, for int8 has none.
    """
    tokens, inputs = x.shape
    group = to.group or inputs
    largest = LARGEST[to.codes]
    wide = torch.nn.functional.pad(x.float(), (0, -inputs % group)).unflatten(-1, (-1, group))
    if to.scale is not None:
        scales = to.scale.float().expand(tokens, wide.shape[1])
    else:
        scales = wide.abs().amax(-1) / largest
        scales = torch.where(scales == 0, 1.0, scales)
    scaled = (wide / scales[..., None]).clamp(-largest, largest)
    if to.codes == torch.int8:
        scaled = scaled.round()
    return QuantizedRows(scaled.to(to.codes).flatten(1)[:, :inputs], scales, x.dtype)


def dequantize_rows(rows: QuantizedRows) -> Tensor:
    """[T, K] fp32"""
    inputs = rows.codes.shape[1]
    group = -(-inputs // rows.scales.shape[1]) if rows.scales.shape[1] == 1 else _GROUP
    return rows.codes.float() * rows.scales.repeat_interleave(group, -1)[:, :inputs]


_GROUP = 128  # the only one that is not the whole row


@op
def rms_norm_rows(x: Tensor, weight: Tensor, eps: float, offset: float, to: RowFormat) -> QuantizedRows:
    """`quantize_rows` of `rms_norm`, which is not rounded to x's dtype between. x [T, d]."""
    normed = rms_norm(x.float(), weight, eps, offset)
    rows = quantize_rows(normed, to)
    return QuantizedRows(rows.codes, rows.scales, x.dtype)


@op
def add_rms_norm_rows(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, to: RowFormat
) -> tuple[QuantizedRows, Tensor]:
    """`add_rms_norm` with its first result quantized. x, residual [T, d]; may overwrite both."""
    total = x + residual
    return rms_norm_rows(total, weight, eps, offset, to), total


@op
def silu_and_mul_rows(x: Tensor, to: RowFormat) -> QuantizedRows:
    """`quantize_rows` of `silu_and_mul`, not rounded between. x [T, 2f] -> codes [T, f]."""
    rows = quantize_rows(silu_and_mul(x.float()), to)
    return QuantizedRows(rows.codes, rows.scales, x.dtype)


@op
def gelu_and_mul_rows(x: Tensor, to: RowFormat) -> QuantizedRows:
    """`quantize_rows` of `gelu_and_mul`, not rounded between. x [T, 2f] -> codes [T, f]."""
    rows = quantize_rows(gelu_and_mul(x.float()), to)
    return QuantizedRows(rows.codes, rows.scales, x.dtype)
