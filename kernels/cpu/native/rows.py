"""Activations in eight bits: each row is made, measured and encoded while it lies in the first cache (src/codes.h)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...packed import QuantizedRows, RowFormat
from ...registry import implements
from .library import DTYPES, OUT_OF_MEMORY, Kernel, address, usable

CODES = {torch.int8: 0, torch.float8_e4m3fn: 1}  # the codes of src/codes.h

_CODES = "iippp"  # kind, group, fixed scale, codes, scales
_quantize = Kernel("quantize", "iipii" + _CODES)
_norm_codes = Kernel("norm_codes", "iiipiiiippffp" + _CODES)
_gate_codes = Kernel("gate_codes", "iipiipi" + _CODES)

Run = Callable[..., int]  # (the fields of Codes) -> status


def _encode(rows: int, width: int, to: RowFormat, dtype: torch.dtype, run: Run) -> QuantizedRows:
    """What `run` makes: codes [rows, width] and their scales."""
    group = to.group or width
    codes = torch.empty((rows, width), dtype=to.codes)
    scales = torch.empty((rows, -(-width // group)), dtype=torch.float32)
    fixed = None if to.scale is None else to.scale.float()
    status = run(CODES[to.codes], group, address(fixed), codes.data_ptr(), scales.data_ptr())
    if status == OUT_OF_MEMORY:
        raise MemoryError("no memory for a row")
    return QuantizedRows(codes, scales, dtype)


@implements("quantize_rows", "native", when=usable)
def quantize_rows(x: Tensor, to: RowFormat) -> QuantizedRows:
    """See the reference."""
    x = _lying_together(x)
    rows, width = x.shape

    def run(*codes: int) -> int:
        return _quantize(rows, DTYPES[x.dtype], x.data_ptr(), x.stride(0), width, *codes)

    return _encode(rows, width, to, x.dtype, run)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, to: RowFormat
) -> QuantizedRows:
    rows, width = x.shape

    def run(*codes: int) -> int:
        return _norm_codes(
            rows,
            DTYPES[x.dtype],
            DTYPES[weight.dtype],
            x.data_ptr(),
            1,
            x.stride(0),
            0,
            width,
            address(residual),
            weight.data_ptr(),
            eps,
            offset,
            0,
            *codes,
        )

    return _encode(rows, width, to, x.dtype, run)


@implements("rms_norm_rows", "native", when=usable)
def rms_norm_rows(x: Tensor, weight: Tensor, eps: float, offset: float, to: RowFormat) -> QuantizedRows:
    """See the reference."""
    return _norm(_lying_together(x), None, weight, eps, offset, to)


@implements("add_rms_norm_rows", "native", when=usable)
def add_rms_norm_rows(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, to: RowFormat
) -> tuple[QuantizedRows, Tensor]:
    """See the reference. The sum overwrites residual where it lies together."""
    residual = residual.contiguous()
    return _norm(_lying_together(x), residual, weight, eps, offset, to), residual


def _gated(x: Tensor, to: RowFormat, gelu: bool) -> QuantizedRows:
    x = _lying_together(x)
    rows, width = x.shape[0], x.shape[1] // 2

    def run(*codes: int) -> int:
        return _gate_codes(rows, DTYPES[x.dtype], x.data_ptr(), x.stride(0), width, 0, gelu, *codes)

    return _encode(rows, width, to, x.dtype, run)


@implements("silu_and_mul_rows", "native", when=usable)
def silu_and_mul_rows(x: Tensor, to: RowFormat) -> QuantizedRows:
    """See the reference."""
    return _gated(x, to, gelu=False)


@implements("gelu_and_mul_rows", "native", when=usable)
def gelu_and_mul_rows(x: Tensor, to: RowFormat) -> QuantizedRows:
    """See the reference."""
    return _gated(x, to, gelu=True)


def _lying_together(x: Tensor) -> Tensor:
    """x, whose rows may be apart but not their entries."""
    return x if x.stride(-1) == 1 else x.contiguous()
