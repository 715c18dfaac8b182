"""The low-rank side path of a linear layer, for rows that may each take another pair of factors.

    x [T, K] ──_shrink──▶ inner [S, T, r] (a slice of the inputs each) ──_expand──▶ y [T, N] += (Σ inner) · aᵀ

Sixteen rows are one tile. It goes through the pairs that its rows take, and reads a pair once for all of them: rows of
one request lie together, so that is mostly one, and in a batch of decodes as many as there are requests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.low_rank import LowRank
from ..registry import implements
from .specialization import Specialization
from .support import INTERPRETED, for_dot, on_gpu

ROWS = 16  # the tensor core's smallest tile
# Inputs of one program. With few rows there is little else to cut: 4096 inputs are 8 programs for each 16 rows.
SLICE = 512


@triton.jit(do_not_specialize=["T"])
def _shrink(
    x, b, index, inner, T, K, stride_x, stride_pair,
    RANK: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """inner[slice, t] = x[t, slice] · b[index[t], :, slice]ᵀ, in fp32."""
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    ranks = tl.arange(0, BR)
    live = rows < T
    taken = tl.load(index + rows, mask=live, other=-1)
    first = tl.min(tl.where(taken < 0, 2147483647, taken))
    acc = tl.zeros((16, BR), tl.float32)
    for pair in range(first, tl.max(taken) + 1):
        mine = taken == pair
        if tl.sum(mine.to(tl.int32)) > 0:
            for k in range(tl.program_id(1) * SLICE, min((tl.program_id(1) + 1) * SLICE, K), BK):
                ks = k + tl.arange(0, BK)
                x_at = x + rows.to(tl.int64)[:, None] * stride_x + ks[None, :]
                b_at = b + pair * stride_pair + ranks[:, None] * K + ks[None, :]
                a = for_dot(tl.load(x_at, mask=mine[:, None] & (ks < K)[None, :], other=0.0), INTERPRETED)
                w = for_dot(tl.load(b_at, mask=(ranks < RANK)[:, None] & (ks < K)[None, :], other=0.0), INTERPRETED)
                acc = tl.dot(a, tl.trans(w).to(a.dtype), acc, input_precision=PRECISION)
    at = inner + (tl.program_id(1) * T + rows).to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(at, acc, mask=live[:, None] & (ranks < RANK)[None, :])


@triton.jit(do_not_specialize=["T"])
def _expand(
    y, inner, a, index, T, N, slices, stride_y, stride_pair,
    RANK: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[t] += (Σ over slices of inner[slice, t]) · a[index[t]]ᵀ, summed in fp32."""
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    live, inside = rows < T, cols < N
    taken = tl.load(index + rows, mask=live, other=-1)
    first = tl.min(tl.where(taken < 0, 2147483647, taken))
    total = tl.zeros((16, BR), tl.float32)
    for s in range(slices):
        at = inner + (s * T + rows).to(tl.int64)[:, None] * RANK + ranks[None, :]
        total += tl.load(at, mask=live[:, None] & (ranks < RANK)[None, :], other=0.0)
    at = y + rows.to(tl.int64)[:, None] * stride_y + cols[None, :]
    written = (taken >= 0)[:, None] & inside[None, :]
    acc = tl.load(at, mask=written, other=0.0).to(tl.float32)
    for pair in range(first, tl.max(taken) + 1):
        mine = taken == pair
        if tl.sum(mine.to(tl.int32)) > 0:
            a_at = a + pair * stride_pair + cols.to(tl.int64)[:, None] * RANK + ranks[None, :]
            w = for_dot(tl.load(a_at, mask=inside[:, None] & (ranks < RANK)[None, :], other=0.0), INTERPRETED)
            # The factor is exact in tf32, which has more bits than y.
            part = tl.where(mine[:, None], total, 0.0)
            acc = tl.dot(part, tl.trans(w).to(tl.float32), acc, input_precision=PRECISION)
    tl.store(at, acc.to(y.dtype.element_ty), mask=written)


@implements("low_rank", "triton", when=on_gpu)
def low_rank(y: Tensor, x: Tensor, factors: LowRank, index: Tensor) -> Tensor:
    """See the reference; overwrites y. The last dimensions of y and x are contiguous, the factors wholly."""
    tokens, inputs = x.shape
    rank = factors.b.shape[1]
    if tokens == 0:
        return y
    slices = triton.cdiv(inputs, SLICE)
    inner = torch.empty(slices, tokens, rank, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(tokens, ROWS)
    constants = _constants(rank, x.dtype)
    _shrink[(tiles, slices)](
        x, factors.b, index, inner, tokens, inputs, x.stride(0), factors.b.stride(0),
        **constants, BK=128, SLICE=SLICE,
    )  # fmt: skip
    _expand[(tiles, triton.cdiv(y.shape[1], 128))](
        y, inner, factors.a, index, tokens, y.shape[1], slices, y.stride(0), factors.a.stride(0), **constants, BN=128
    )
    return y


def _constants(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "RANK": rank,
        "BR": max(16, triton.next_power_of_2(rank)),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "INTERPRETED": INTERPRETED,
    }


def specializations() -> list[Specialization]:
    """Rank 16 and 64, on 4096 inputs and outputs."""
    result = []
    for rank in (16, 64):
        constants = _constants(rank, torch.bfloat16) | {"INTERPRETED": False}
        shrink = {
            "x": "*bf16:16", "b": "*bf16:16", "index": "*i64:16", "inner": "*fp32:16",
            "T": "i32", "K": "i32:16", "stride_x": "i32:16", "stride_pair": "i32:16",
        }  # fmt: skip
        expand = {
            "y": "*bf16:16", "inner": "*fp32:16", "a": "*bf16:16", "index": "*i64:16",
            "T": "i32", "N": "i32:16", "slices": "i32", "stride_y": "i32:16", "stride_pair": "i32:16",
        }  # fmt: skip
        result += [
            Specialization(
                f"shrink/r{rank}", _shrink, shrink, constants | {"BK": 128, "SLICE": SLICE}, needs=("mma", "wide")
            ),
            Specialization(f"expand/r{rank}", _expand, expand, constants | {"BN": 128}, needs=("mma", "wide")),
        ]
    return result
