"""What all Triton kernels share: where they run, and arithmetic that the compiler and the interpreter agree on.

Triton's interpreter holds bf16 as raw 16-bit integers, so arithmetic on it is garbage, and its casts truncate. Kernels
therefore take `INTERPRETED: tl.constexpr` where it matters and widen right after a load (`for_dot`).
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from ..registry import Target

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton read it when the kernels were decorated

_INTERPRETED = tl.constexpr(INTERPRETED)

# The magic number of round-to-nearest-even: 1.5 · 2²³ added to |v| < 2²² leaves the integer in the low mantissa bits.
_ROUND = tl.constexpr(12582912.0)


def on_gpu(target: Target) -> str | None:
    """The predicate of a kernel that every supported GPU runs, and the CPU where Triton interprets."""
    if target.device == "cuda" or (INTERPRETED and target.device == "cpu"):
        return None
    return f"runs on cuda, the target is {target.device}"


@triton.jit
def rint(v):
    """fp32 to the nearest integer, ties to even, still fp32; |v| < 2²²."""
    return (v + _ROUND) - _ROUND


@triton.jit
def for_dot(x, INTERPRETED: tl.constexpr):
    """A tile as an operand of tl.dot: as it is, but fp32 in the interpreter."""
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def to_e4m3(v):
    """fp32 to float8 e4m3: clamped to ±448, then to nearest even. NaN stays NaN, but in the interpreter."""
    v = tl.minimum(tl.maximum(v, -448.0, propagate_nan=tl.PropagateNan.ALL), 448.0, propagate_nan=tl.PropagateNan.ALL)
    if _INTERPRETED:
        # The interpreter's cast loses the carry of 1.99 into its exponent and gives 1: a number of the grid it keeps.
        bits = v.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        v = tl.where(tl.abs(v) < 0.015625, (v + 24576.0) - 24576.0, normal)  # below 2⁻⁶ the grid's step is 2⁻⁹
    return v.to(tl.float8e4nv, fp_downcast_rounding="rtne")
