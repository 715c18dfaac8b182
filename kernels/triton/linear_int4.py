"""Products with four-bit weights (W4A16): for few rows, for more, and for so many that unpacking first is cheaper.

An iteration is one pack block: two half blocks of codes, as whole numbers, times two half blocks of x; the sum takes
the scale of its group. So outputs are scaled and not weights (BM · BN numbers instead of 128 · BN), and codes minus
zeros (-15 .. 15) are exact in bf16 and fp16.

A single row goes the way of a few. A product without tensor cores, compiled for sm_90, takes 6.1 instructions per
weight, this one 2.9; at 3.35 TB/s each of 132 multiprocessors meets 29 weights a clock, and issues 128 instructions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed import PackedWeight
from ..reference.int4 import split_block
from ..registry import implements
from ..tuning import A100, FEW_ROWS, H100, Shape, Tile, default_tile, tile_for
from .slices import add_slices, arrivals, partials, programs
from .specialization import Specialization
from .support import INTERPRETED, for_dot, on_gpu
from .tiles import int4_columns, int4_halves, store_tile, tile_of, woven

COLUMNS = 16  # outputs are padded to a multiple, so that every row of codes begins where a 128-bit load can


@triton.jit
def _quarter(quad, at: tl.constexpr, KIND: tl.constexpr):
    """The 16-bit number `at` of the four in a 64-bit word, as fp32."""
    return ((quad >> (16 * at)) & 0xFFFF).to(tl.uint16).to(KIND, bitcast=True).to(tl.float32)[None, :]


@triton.jit
def _scale_columns(scales, words, inside):
    """Scales of outputs 4w, 4w + 1, 4w + 2, 4w + 3 for each of `words` [W]: four [1, W] fp32."""
    KIND: tl.constexpr = scales.dtype.element_ty
    if KIND.primitive_bitwidth == 16:
        # One load is wide enough to be fetched ahead with the codes (cp.async takes 4 bytes or more).
        quad = tl.load(scales.to(tl.pointer_type(tl.int64)) + words, mask=inside, other=0)
        s0, s1 = _quarter(quad, 0, KIND), _quarter(quad, 1, KIND)
        s2, s3 = _quarter(quad, 2, KIND), _quarter(quad, 3, KIND)
    else:
        s0 = tl.load(scales + 4 * words, mask=inside, other=0)[None, :]
        s1 = tl.load(scales + 4 * words + 1, mask=inside, other=0)[None, :]
        s2 = tl.load(scales + 4 * words + 2, mask=inside, other=0)[None, :]
        s3 = tl.load(scales + 4 * words + 3, mask=inside, other=0)[None, :]
    return s0, s1, s2, s3


@triton.jit(do_not_specialize=["M"])
def _few(
    x, codes, scales, zeros, bias, out, partial, arrived, M, N, K, pitch, stride_x,
    BLOCK: tl.constexpr, PER_GROUP: tl.constexpr, SLICED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Memory-bound: the codes come from shared memory as words straight into the order that mma.sync wants.

    A word is four neighbouring outputs, so there are four products, of the outputs 4w, 4w + 1, 4w + 2 and 4w + 3.
    """
    HALF: tl.constexpr = BLOCK // 2
    WORDS: tl.constexpr = BN // 4
    row_tile, col_tile = tile_of(tl.program_id(0), M, N, BM, BN)
    per_slice = tl.cdiv(K // BLOCK, tl.num_programs(1))
    first = tl.program_id(1) * per_slice
    last = min(first + per_slice, K // BLOCK)
    rows = row_tile * BM + tl.arange(0, BM)
    words = col_tile * WORDS + tl.arange(0, WORDS)
    half = tl.arange(0, HALF)
    row_pitch = pitch // 4
    live, inside = (rows < M)[:, None], words < row_pitch
    x_at = x + rows.to(tl.int64)[:, None] * stride_x + (first * BLOCK + half)[None, :]
    word_codes = codes.to(tl.pointer_type(tl.int32))
    w_at = word_codes + (first * HALF + half).to(tl.int64)[:, None] * row_pitch + words[None, :]
    a0 = tl.zeros((BM, WORDS), tl.float32)
    a1 = tl.zeros((BM, WORDS), tl.float32)
    a2 = tl.zeros((BM, WORDS), tl.float32)
    a3 = tl.zeros((BM, WORDS), tl.float32)
    for block in range(first, last):
        low = for_dot(tl.load(x_at, mask=live, other=0), INTERPRETED)
        high = for_dot(tl.load(x_at + HALF, mask=live, other=0), INTERPRETED)
        # Weights are read once; what stays in L2 is x and the sums.
        w = tl.load(w_at, mask=inside[None, :], other=0, eviction_policy="evict_first")
        group = block // PER_GROUP
        if zeros is None:
            zero = tl.full((WORDS,), 0x08080808, tl.int32)
        else:
            zero = tl.load(zeros.to(tl.pointer_type(tl.int32)) + group * row_pitch + words, mask=inside, other=0)
        l0, l1, l2, l3, h0, h1, h2, h3 = int4_columns(w, zero, x.dtype.element_ty, INTERPRETED)
        s0, s1, s2, s3 = _scale_columns(scales + group * pitch, words, inside)
        a0 += tl.dot(high, h0, tl.dot(low, l0, input_precision=PRECISION), input_precision=PRECISION) * s0
        a1 += tl.dot(high, h1, tl.dot(low, l1, input_precision=PRECISION), input_precision=PRECISION) * s1
        a2 += tl.dot(high, h2, tl.dot(low, l2, input_precision=PRECISION), input_precision=PRECISION) * s2
        a3 += tl.dot(high, h3, tl.dot(low, l3, input_precision=PRECISION), input_precision=PRECISION) * s3
        x_at += BLOCK
        w_at += HALF * row_pitch
    cols = col_tile * BN + tl.arange(0, BN)
    acc = woven(a0, a1, a2, a3)
    acc, mine = add_slices(acc, partial, arrived, tl.program_id(0), rows, cols, M, N, SLICED)
    if mine:
        store_tile(acc, out, bias, rows, cols, M, N)


@triton.jit(do_not_specialize=["M"])
def _more(
    x, codes, scales, zeros, bias, out, partial, arrived, M, N, K, pitch, stride_x,
    BLOCK: tl.constexpr, PER_GROUP: tl.constexpr, SLICED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """As `_few`, in one product of BN outputs: Hopper's wgmma wants that many, and takes them from shared memory."""
    HALF: tl.constexpr = BLOCK // 2
    row_tile, col_tile = tile_of(tl.program_id(0), M, N, BM, BN)
    per_slice = tl.cdiv(K // BLOCK, tl.num_programs(1))
    first = tl.program_id(1) * per_slice
    last = min(first + per_slice, K // BLOCK)
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    half = tl.arange(0, HALF)
    live, inside = (rows < M)[:, None], cols < pitch
    x_at = x + rows.to(tl.int64)[:, None] * stride_x + (first * BLOCK + half)[None, :]
    w_at = codes + (first * HALF + half).to(tl.int64)[:, None] * pitch + cols[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for block in range(first, last):
        low = for_dot(tl.load(x_at, mask=live, other=0), INTERPRETED)
        high = for_dot(tl.load(x_at + HALF, mask=live, other=0), INTERPRETED)
        w = tl.load(w_at, mask=inside[None, :], other=0)  # other row tiles read it too
        group = block // PER_GROUP
        if zeros is None:
            zero = tl.full((BN,), 8, tl.uint8)
        else:
            zero = tl.load(zeros + group * pitch + cols, mask=inside, other=0)
        scale = tl.load(scales + group * pitch + cols, mask=inside, other=0).to(tl.float32)[None, :]
        w_low, w_high = int4_halves(w, zero, x.dtype.element_ty, INTERPRETED)
        part = tl.dot(low, w_low, input_precision=PRECISION)
        acc += tl.dot(high, w_high, part, input_precision=PRECISION) * scale
        x_at += BLOCK
        w_at += HALF * pitch
    acc, mine = add_slices(acc, partial, arrived, tl.program_id(0), rows, cols, M, N, SLICED)
    if mine:
        store_tile(acc, out, bias, rows, cols, M, N)


@triton.jit
def _unpack(
    codes, scales, zeros, out, N, pitch,
    BLOCK: tl.constexpr, PER_GROUP: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out [K, N] = the weights of one pack block, rounded to out's dtype."""
    HALF: tl.constexpr = BLOCK // 2
    block = tl.program_id(0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    half = tl.arange(0, HALF)
    inside = cols < N
    group = block // PER_GROUP
    w_at = codes + (block * HALF + half).to(tl.int64)[:, None] * pitch + cols[None, :]
    w = tl.load(w_at, mask=inside[None, :], other=0, eviction_policy="evict_first")
    if zeros is None:
        zero = tl.full((BN,), 8, tl.uint8)
    else:
        zero = tl.load(zeros + group * pitch + cols, mask=inside, other=0)
    scale = tl.load(scales + group * pitch + cols, mask=inside, other=0).to(tl.float32)[None, :]
    low, high = int4_halves(w, zero, out.dtype.element_ty, INTERPRETED)
    at = out + (block * BLOCK + half).to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(at, (low.to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside[None, :])
    tl.store(at + HALF * N, (high.to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside[None, :])


class PackedInt4(NamedTuple):
    """codes [K / 2, P] uint8, scales [G, P], zeros [G, P] uint8 or None: P = N rounded up to `COLUMNS`."""

    weight: PackedWeight
    bias: Tensor | None
    arrived: Tensor


def prepare(weight: PackedWeight, bias: Tensor | None) -> PackedInt4:
    return PackedInt4(
        replace(
            weight,
            codes=_aligned(weight.codes),
            scales=_aligned(weight.scales),
            zeros=None if weight.zeros is None else _aligned(weight.zeros),
        ),
        bias,
        arrivals(weight.codes.device),
    )


def _aligned(rows: Tensor) -> Tensor:
    """Columns padded to a multiple of `COLUMNS`; the tensor itself where nothing has to be done."""
    missing = -rows.shape[1] % COLUMNS
    return (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).contiguous()


@implements("linear_int4", "triton", when=on_gpu, prepare=prepare)
def linear_int4(x: Tensor, packed: Any) -> Tensor:
    """See the reference. The last dimension of x is contiguous; rows may be apart.

    Beyond 512 rows (or where `quire tune` finds it faster) weights are rounded to x's dtype before the product.
    """
    weight = packed.weight
    tile = tile_for("linear_int4", Shape(x.shape[0], weight.outputs, weight.inputs, weight.group), x.device)
    return multiply(x, packed, tile)


def multiply(x: Tensor, packed: PackedInt4, tile: Tile) -> Tensor:
    """x [T, K] -> [T, N] by a given tile."""
    weight = packed.weight
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    out = x.new_empty(x.shape[0], weight.outputs)
    if x.shape[0] == 0:
        return out
    if tile.rows == 0:
        return _dense(x, packed)
    grid = programs(tile, *out.shape)
    kernel = _few if tile.rows <= FEW_ROWS else _more
    kernel[grid](
        x, weight.codes, weight.scales, weight.zeros, packed.bias, out,
        partials(grid, *out.shape, torch.float32, x.device), packed.arrived,
        x.shape[0], weight.outputs, weight.inputs, weight.codes.shape[1], x.stride(0),
        **_constants(weight.group, tile._replace(slices=grid[1]), x.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _constants(group: int, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    block = split_block(group)
    return {
        "BLOCK": block,
        "PER_GROUP": group // block,
        "SLICED": tile.slices > 1,
        "BM": tile.rows,
        "BN": tile.outputs,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # of fp32 operands only
        "INTERPRETED": INTERPRETED,
    }


def _dense(x: Tensor, packed: PackedInt4) -> Tensor:
    weight = packed.weight
    block = split_block(weight.group)
    plain = x.new_empty(weight.inputs, weight.outputs)
    _unpack[(weight.inputs // block, triton.cdiv(weight.outputs, 128))](
        weight.codes, weight.scales, weight.zeros, plain, weight.outputs, weight.codes.shape[1],
        BLOCK=block, PER_GROUP=weight.group // block, BN=128, INTERPRETED=INTERPRETED, num_warps=4,
    )  # fmt: skip
    return x @ plain if packed.bias is None else torch.addmm(packed.bias.to(x.dtype), x, plain)


def specializations() -> list[Specialization]:
    """A 4096 x 4096 weight at every size of tile that the rule takes."""
    tensors = {
        "x": "*bf16:16", "codes": "*u8:16", "scales": "*fp16:16", "zeros": "*u8:16", "out": "*bf16:16",
        "partial": "*fp32:16", "arrived": "*i32:16",
    }  # fmt: skip
    sizes = {"M": "i32", "N": "i32:16", "K": "i32:16", "pitch": "i32:16", "stride_x": "i32:16"}
    result = []
    for rows, group, zeros, card in (
        (16, 128, True, H100),
        (16, 128, False, H100),
        (16, 32, True, H100),
        (64, 128, True, H100),
        (256, 128, True, H100),
        (256, 128, True, A100),
    ):
        tile = default_tile("linear_int4", Shape(rows, 4096, 4096, group), card)
        absent = {"bias": None} | ({} if zeros else {"zeros": None}) | ({"partial": None} if tile.slices == 1 else {})
        result.append(
            Specialization(
                name=f"{tile.rows}x{tile.outputs}/warps{tile.warps}/g{group}/{'zeros' if zeros else 'symmetric'}",
                kernel=_few if tile.rows <= FEW_ROWS else _more,
                signature={name: kind for name, kind in (tensors | sizes).items() if name not in absent},
                constexprs=_constants(group, tile, torch.bfloat16) | {"INTERPRETED": False} | absent,
                num_warps=tile.warps,
                num_stages=tile.stages,
                arches=(80, 90, 100) if tile.rows <= FEW_ROWS else (80,) if card.major < 9 else (90, 100),
                needs=("mma", "wide"),
            )
        )
    unpacked = {
        "codes": "*u8:16", "scales": "*fp16:16", "zeros": "*u8:16", "out": "*bf16:16", "N": "i32:16", "pitch": "i32:16",
    }  # fmt: skip
    constants = {"BLOCK": 128, "PER_GROUP": 1, "BN": 128, "INTERPRETED": False}
    return [*result, Specialization("unpack", _unpack, unpacked, constants, needs=("wide",))]
