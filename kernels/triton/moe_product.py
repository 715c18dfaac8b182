"""Grouped products: row tiles of one expert each, times that expert's weight, in any of the formats.

    x rows ──gather by order──▶ x · [gate, up]ᵀ ──▶ activation(gate) · up, row of the choice
    h rows ──gather by order──▶ h · downᵀ · routed weight, row of the choice ──▶ sum of a token's k rows

PRODUCT says how a K block is multiplied:

    plain   x · w                    w [N, K] of x's dtype
    int8    x · code                 codes [N, K] int8
    int4    x · (code - zero)        codes [K / 2, N] uint8, see reference/int4.py
    w8a8    integers · integers      both int8, summed in int32
    fp8     e4m3 · e4m3              both e4m3

Scales come after the dot: once at the end where one spans all of K (GROUP = 0), else after every K block, which lies
within one group. That multiplies BM · BN numbers instead of BK · BN, and 4- and 8-bit integers are exact in 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import gated
from .support import for_dot
from .tiles import int4_halves, tile_of


@triton.jit
def row_tile(x, start, present, k0, K, PRODUCT: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Columns k0 .. k0 + BK of gathered rows, as the two half blocks that int4 needs, or twice as one.

    x points at the tensor, start [BM] at its rows. Of the two that are one, the compiler keeps one.
    """
    if PRODUCT == "int4":
        column = k0 + tl.arange(0, BK // 2)
        low = tl.load(x + start[:, None] + column[None, :], mask=present[:, None], other=0.0)
        high = tl.load(x + start[:, None] + (column + BK // 2)[None, :], mask=present[:, None], other=0.0)
        return for_dot(low, INTERPRETED), for_dot(high, INTERPRETED)
    else:
        column = k0 + tl.arange(0, BK)
        both = tl.load(x + start[:, None] + column[None, :], mask=present[:, None] & (column < K)[None, :], other=0.0)
        if PRODUCT == "plain" or PRODUCT == "int8":
            both = for_dot(both, INTERPRETED)
        return both, both


@triton.jit
def multiply(
    acc,
    low,
    high,
    x_scales,
    present,
    codes,
    scales,
    zeros,
    column,
    inside,
    N,
    k0,
    K,
    PRODUCT: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    EVICT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """acc [BM, BN] plus this K block of rows times the outputs `column` [BN] of one expert, of which `inside` exist.

    x_scales: [BM] pointers to the rows' first scales, or None; present [BM]: the rows that exist.
    """
    group = 0
    if GROUP > 0:
        group = k0 // GROUP
        part = tl.zeros(acc.shape, acc.dtype)
    else:
        part = acc
    if PRODUCT == "int4":
        byte = k0 // 2 + tl.arange(0, BK // 2)
        packed = tl.load(
            codes + byte[:, None] * N + column[None, :], mask=inside[None, :], other=0, eviction_policy=EVICT
        )
        if zeros is None:
            zero = tl.full(column.shape, 8, tl.uint8)
        else:
            zero = tl.load(zeros + group * N + column, mask=inside, other=8)
        w_low, w_high = int4_halves(packed, zero, low.dtype, INTERPRETED)
        part = tl.dot(low, w_low, part, input_precision="ieee")
        part = tl.dot(high, w_high, part, input_precision="ieee")
    else:
        k = k0 + tl.arange(0, BK)
        w = tl.load(
            codes + column[:, None] * K + k[None, :],
            mask=inside[:, None] & (k < K)[None, :],
            other=0.0,
            eviction_policy=EVICT,
        )
        if PRODUCT == "w8a8":
            part = tl.dot(low, w.T, part, out_dtype=tl.int32)
        elif PRODUCT == "fp8":
            # Hopper's fp8 products are summed with 14 bits: into fp32 after every block of 128.
            part = tl.dot(low, w.T, part, max_num_imprecise_acc=BK)
        else:
            part = tl.dot(low, for_dot(w, INTERPRETED).to(low.dtype).T, part, input_precision="ieee")
    if GROUP > 0:
        scale = tl.load(scales + group * N + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if x_scales is not None:
            scale = scale * tl.load(x_scales + group, mask=present, other=0.0)[:, None]
        part = acc + part * scale
    return part


@triton.jit
def whole_scale(acc, x_scales, present, scales, column, inside, GROUP: tl.constexpr):
    """acc in fp32, times the scales that span all of K."""
    acc = acc.to(tl.float32)
    if scales is not None and GROUP == 0:
        acc *= tl.load(scales + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if x_scales is not None:
            acc *= tl.load(x_scales, mask=present, other=0.0)[:, None]
    return acc


@triton.jit(do_not_specialize=["choices"])
def gate_up(
    x,
    x_scales,
    codes,
    scales,
    zeros,
    out,
    order,
    owners,
    tiles,
    choices,
    k,
    max_rows,
    f,
    K,
    x_stride,
    x_groups,
    groups,
    expert_codes,
    PRODUCT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVICT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[c] = activation(x[c / k] · gateᵀ) · (x[c / k] · upᵀ) for the choices c of a row tile, BN of f columns.

    Gate and up of the same columns are made side by side from one load of x, so that neither is ever stored.
    """
    tile, across = tile_of(tl.program_id(0), max_rows, f, BM, BN)
    if tile >= tl.load(tiles):
        return
    choice = tl.load(order + tile * BM + tl.arange(0, BM))
    present = choice < choices
    source = (choice // k).to(tl.int64)
    start = source * x_stride
    if x_scales is not None:
        x_scales += source * x_groups
    expert = tl.load(owners + tile).to(tl.int64)
    codes += expert * expert_codes
    if scales is not None:
        scales += expert * groups * 2 * f
    if zeros is not None:
        zeros += expert * groups * 2 * f
    column = across * BN + tl.arange(0, BN)
    inside = column < f
    ACC: tl.constexpr = tl.int32 if PRODUCT == "w8a8" else tl.float32
    gate, up = tl.zeros((BM, BN), ACC), tl.zeros((BM, BN), ACC)
    for k0 in range(0, K, BK):
        low, high = row_tile(x, start, present, k0, K, PRODUCT, BK, INTERPRETED)
        gate = multiply(
            gate, low, high, x_scales, present, codes, scales, zeros, column, inside, 2 * f, k0, K,
            PRODUCT, GROUP, BK, EVICT, INTERPRETED,
        )  # fmt: skip
        up = multiply(
            up, low, high, x_scales, present, codes, scales, zeros, column + f, inside, 2 * f, k0, K,
            PRODUCT, GROUP, BK, EVICT, INTERPRETED,
        )  # fmt: skip
    gate = whole_scale(gate, x_scales, present, scales, column, inside, GROUP)
    up = whole_scale(up, x_scales, present, scales, column + f, inside, GROUP)
    place = out + choice.to(tl.int64)[:, None] * f + column[None, :]
    tl.store(place, gated(gate, up, ACTIVATION).to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["choices"])
def down(
    x,
    x_scales,
    codes,
    scales,
    zeros,
    out,
    shares,
    order,
    owners,
    tiles,
    choices,
    max_rows,
    N,
    K,
    x_stride,
    x_groups,
    groups,
    expert_codes,
    PRODUCT: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVICT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[c] = shares[c] · (x[c] · downᵀ) for the choices c of a row tile, BN of N columns."""
    tile, across = tile_of(tl.program_id(0), max_rows, N, BM, BN)
    if tile >= tl.load(tiles):
        return
    choice = tl.load(order + tile * BM + tl.arange(0, BM))
    present = choice < choices
    choice = choice.to(tl.int64)
    if x_scales is not None:
        x_scales += choice * x_groups
    expert = tl.load(owners + tile).to(tl.int64)
    codes += expert * expert_codes
    if scales is not None:
        scales += expert * groups * N
    if zeros is not None:
        zeros += expert * groups * N
    column = across * BN + tl.arange(0, BN)
    inside = column < N
    acc = tl.zeros((BM, BN), tl.int32 if PRODUCT == "w8a8" else tl.float32)
    for k0 in range(0, K, BK):
        low, high = row_tile(x, choice * x_stride, present, k0, K, PRODUCT, BK, INTERPRETED)
        acc = multiply(
            acc, low, high, x_scales, present, codes, scales, zeros, column, inside, N, k0, K,
            PRODUCT, GROUP, BK, EVICT, INTERPRETED,
        )  # fmt: skip
    acc = whole_scale(acc, x_scales, present, scales, column, inside, GROUP)
    share = tl.load(shares + choice, mask=present, other=0.0).to(tl.float32)
    place = out + choice[:, None] * N + column[None, :]
    tl.store(place, (acc * share[:, None]).to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


@triton.jit
def sum_choices(parts, out, d, k, BLOCK: tl.constexpr):
    """out [T, d] = the sum of a token's k rows of parts [T · k, d], in fp32 and in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, k):
        total += tl.load(parts + (token * k + j) * d + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * d + column, total.to(out.dtype.element_ty), mask=inside)
