"""Gated activations, elementwise: bound by memory, so all that counts is wide loads and enough of them in flight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .specialization import Specialization
from .support import on_gpu

_BLOCK = 1024  # outputs of a program: eight bf16, two 128-bit loads, for each of its 128 threads

_LOG2_E = tl.constexpr(1.4426950408889634)
_GELU = tl.constexpr(2 * 0.7978845608028654 * 1.4426950408889634)  # 2 · sqrt(2 / π) · log2(e)
_GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """silu(gate) · up or gelu(gate) · up, all fp32.

    (1 + tanh(u)) / 2 is the logistic function of 2u, so that both are gate · up / (1 + 2^-z).
    """
    if ACTIVATION == "silu":
        z = gate * _LOG2_E
    else:
        z = gate * (1.0 + _GELU_CUBE * gate * gate) * _GELU
    # Beyond 2^126 the quotient is nothing beside any up; the bound keeps infinities, and their warnings, out.
    return gate / (1.0 + tl.exp2(tl.minimum(-z, 126.0))) * up


@triton.jit
def _gated(x, out, f, x_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < f
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + f + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * f + column, gated(gate, up, ACTIVATION).to(out.dtype.element_ty), mask=inside)


def _launch(x: Tensor, activation: str) -> Tensor:
    rows, f = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, f, dtype=x.dtype, device=x.device)
    if rows:
        _gated[(rows, triton.cdiv(f, _BLOCK))](x, out, f, x.stride(0), ACTIVATION=activation, BLOCK=_BLOCK)
    return out


@implements("silu_and_mul", "triton", when=on_gpu)
def silu_and_mul(x: Tensor) -> Tensor:
    """See the reference. Rows may be strided."""
    return _launch(x, "silu")


@implements("gelu_and_mul", "triton", when=on_gpu)
def gelu_and_mul(x: Tensor) -> Tensor:
    """See the reference. Rows may be strided."""
    return _launch(x, "gelu")


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time."""
    signature = {"x": "*bf16:16", "out": "*bf16:16", "f": "i32:16", "x_stride": "i32:16"}
    return [
        Specialization(activation, _gated, signature, {"ACTIVATION": activation, "BLOCK": _BLOCK}, needs=("wide",))
        for activation in ("silu", "gelu")
    ]
