"""Rotary embedding of queries and keys in one launch, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .specialization import Specialization
from .support import on_gpu

_TILE = 1024  # pairs of a program: eight per thread, one 128-bit load of bf16 for each half of the head


@triton.jit
def angles(positions, table, token, half, HALF: tl.constexpr):
    """(cos, sin) of a token's position, each [HALF] fp32; table [P, 2 · half]."""
    index = tl.arange(0, HALF)
    row = table + tl.load(positions + token).to(tl.int64) * (2 * half)
    cos = tl.load(row + index, mask=index < half, other=0.0)
    sin = tl.load(row + half + index, mask=index < half, other=0.0)
    return cos, sin


@triton.jit
def turn(x, head, heads, head_stride, cos, sin, half, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotate the first 2 · half columns of the heads `head` [HEADS] of the token at x, in place."""
    start = x + head[:, None].to(tl.int64) * head_stride
    present = (head < heads)[:, None]
    if INTERLEAVED:
        # Both of a pair lie side by side: loaded as one stretch and parted in registers, or half of each line is waste.
        column = tl.arange(0, 2 * HALF)[None, :]
        inside = present & (column < 2 * half)
        pairs = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (head.shape[0], HALF, 2)))
        turned = tl.interleave(a * cos - b * sin, b * cos + a * sin)
        tl.store(start + column, turned.to(x.dtype.element_ty), mask=inside)
    else:
        column = tl.arange(0, HALF)[None, :]
        inside = present & (column < half)
        a = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(start + half + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(start + column, (a * cos - b * sin).to(x.dtype.element_ty), mask=inside)
        tl.store(start + half + column, (b * cos + a * sin).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _rope(
    q,
    k,
    positions,
    table,
    q_heads,
    k_heads,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Program (t, i): HEADS heads of token t, first those of q, then those of k."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cos, sin = angles(positions, table, token, half, HALF)
    q_parts = tl.cdiv(q_heads, HEADS)
    head = tl.arange(0, HEADS)
    if part < q_parts:
        x = q + token * q_token_stride
        turn(x, part * HEADS + head, q_heads, q_head_stride, cos[None, :], sin[None, :], half, HALF, INTERLEAVED)
    else:
        x = k + token * k_token_stride
        head += (part - q_parts) * HEADS
        turn(x, head, k_heads, k_head_stride, cos[None, :], sin[None, :], half, HALF, INTERLEAVED)


def _tile(heads: int, half: int) -> tuple[int, int, int]:
    """(heads, pairs, warps) of a program."""
    pairs = max(2, triton.next_power_of_2(half))
    held = min(triton.next_power_of_2(heads), max(1, _TILE // pairs))
    return held, pairs, min(max(held * pairs // 256, 1), 4)


@implements("rope", "triton", when=on_gpu)
def rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """See the reference. In place; q and k may be views of a joined qkv with contiguous heads."""
    tokens, q_heads, _ = q.shape
    k_heads, half = k.shape[1], table.shape[1] // 2
    if tokens:
        heads, pairs, warps = _tile(max(q_heads, k_heads), half)
        _rope[(tokens, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))](
            q,
            k,
            positions,
            table,
            q_heads,
            k_heads,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            half,
            HEADS=heads,
            HALF=pairs,
            INTERLEAVED=interleaved,
            num_warps=warps,
        )
    return q, k


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: heads of 128, turned whole, in halves and in pairs."""
    heads, pairs, warps = _tile(32, 64)
    tensors = {"q": "*bf16:16", "k": "*bf16:16", "positions": "*i64:16", "table": "*fp32:16"}
    strides = dict.fromkeys(("q_token_stride", "q_head_stride", "k_token_stride", "k_head_stride", "half"), "i32:16")
    signature = tensors | strides | {"q_heads": "i32", "k_heads": "i32"}
    return [
        Specialization(
            name="interleaved" if interleaved else "halves",
            kernel=_rope,
            signature=signature,
            constexprs={"HEADS": heads, "HALF": pairs, "INTERLEAVED": interleaved},
            num_warps=warps,
            needs=("wide",),
        )
        for interleaved in (False, True)
    ]
