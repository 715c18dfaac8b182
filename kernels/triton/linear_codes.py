"""Products of quantized activations with quantized weights: int8 (w8a8), e4m3 (fp8), e4m3 in blocks (fp8_block).

Both operands lie along the inputs, so their codes come in 128-bit loads and go to the tensor core as they are. One
scale per row and one per output are applied after the last sum; where 128 inputs have scales of their own, after each
128.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed import PackedWeight, QuantizedRows, weight_format
from ..registry import Target, implements
from ..tuning import A100, H100, Card, Shape, Tile, default_tile, tile_for
from .rows import quantize_rows
from .slices import add_slices, arrivals, partials, programs
from .specialization import Specialization
from .support import on_gpu
from .tiles import store_tile, tile_of


@triton.jit(do_not_specialize=["M"])
def _product(
    x, x_scales, codes, scales, bias, out, partial, arrived, M, N, K, stride_x, stride_row, stride_group,
    GROUPED: tl.constexpr, FULL: tl.constexpr, SLICED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [M, K] and codes [N, K] in int8 or e4m3; x_scales one per row (and block, if GROUPED); scales [G, N].

    FULL: K is a multiple of BK, and nothing has to be masked along it.
    """
    row_tile, col_tile = tile_of(tl.program_id(0), M, N, BM, BN)
    blocks = tl.cdiv(K, BK)
    per_slice = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.program_id(1) * per_slice
    last = min(first + per_slice, blocks)
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    ks = first * BK + tl.arange(0, BK)
    live, inside = rows < M, cols < N
    x_at = x + rows.to(tl.int64)[:, None] * stride_x + ks[None, :]
    w_at = codes + cols.to(tl.int64)[:, None] * K + ks[None, :]
    # With one row tile a weight is read once, and what should stay in L2 is x.
    EVICT: tl.constexpr = "evict_first" if BM <= 16 else ""
    INTEGERS: tl.constexpr = x.dtype.element_ty == tl.int8
    acc = tl.zeros((BM, BN), tl.int32 if INTEGERS else tl.float32)
    for block in range(first, last):
        if FULL:
            a = tl.load(x_at, mask=live[:, None], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0.0, eviction_policy=EVICT)
        else:
            there = (ks < K)[None, :]
            a = tl.load(x_at, mask=live[:, None] & there, other=0.0)
            w = tl.load(w_at, mask=inside[:, None] & there, other=0.0, eviction_policy=EVICT)
            ks += BK
        if INTEGERS:
            acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)
        elif GROUPED:
            row_scale = tl.load(x_scales + rows * stride_row + block * stride_group, mask=live, other=0.0)[:, None]
            scale = tl.load(scales + block * N + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
            acc += tl.dot(a, tl.trans(w)) * row_scale * scale
        else:
            # Hopper adds fp8 products in some 14 bits, so every 128 of them are added to a sum in fp32.
            acc = tl.dot(a, tl.trans(w), acc, max_num_imprecise_acc=BK)
        x_at += BK
        w_at += BK
    acc, mine = add_slices(acc, partial, arrived, tl.program_id(0), rows, cols, M, N, SLICED)
    if mine:
        total = acc.to(tl.float32)
        if not GROUPED:
            total *= tl.load(x_scales + rows * stride_row, mask=live, other=0.0)[:, None]
            total *= tl.load(scales + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        store_tile(total, out, bias, rows, cols, M, N)


class PackedCodes(NamedTuple):
    weight: PackedWeight
    bias: Tensor | None
    arrived: Tensor


def prepare(weight: PackedWeight, bias: Tensor | None) -> PackedCodes:
    weight = replace(weight, codes=weight.codes.contiguous(), scales=weight.scales.contiguous())
    return PackedCodes(weight, bias, arrivals(weight.codes.device))


def has_fp8(target: Target) -> str | None:
    """e4m3 operands of tensor cores came with Ada; the interpreter has them too."""
    least = weight_format("fp8").capability
    if target.device == "cuda" and target.capability < least:
        needs, has = (".".join(map(str, capability)) for capability in (least, target.capability))
        return f"needs compute capability {needs}, the GPU has {has}"
    return on_gpu(target)


@implements("linear_w8a8", "triton", when=on_gpu, prepare=prepare)
def linear_w8a8(x: Tensor | QuantizedRows, packed: Any) -> Tensor:
    """See the reference; the same integers."""
    return _linear("linear_w8a8", x, packed)


@implements("linear_fp8", "triton", when=has_fp8, prepare=prepare)
def linear_fp8(x: Tensor | QuantizedRows, packed: Any) -> Tensor:
    """See the reference."""
    return _linear("linear_fp8", x, packed)


@implements("linear_fp8_block", "triton", when=has_fp8, prepare=prepare)
def linear_fp8_block(x: Tensor | QuantizedRows, packed: Any) -> Tensor:
    """See the reference."""
    return _linear("linear_fp8_block", x, packed)


def _linear(op: str, x: Tensor | QuantizedRows, packed: PackedCodes) -> Tensor:
    weight = packed.weight
    if not isinstance(x, QuantizedRows):
        wanted = weight_format(weight.format).rows(weight)
        assert wanted is not None
        x = quantize_rows(x, wanted)
    shape = Shape(x.codes.shape[0], weight.outputs, weight.inputs, weight.group)
    return multiply(x, packed, tile_for(op, shape, x.codes.device))


def multiply(x: QuantizedRows, packed: PackedCodes, tile: Tile) -> Tensor:
    """x [T, K] -> [T, N] by a given tile."""
    weight = packed.weight
    rows, device = x.codes.shape[0], x.codes.device
    out = torch.empty(rows, weight.outputs, dtype=x.dtype, device=device)
    if rows == 0:
        return out
    grid = programs(tile, *out.shape)
    sums = torch.int32 if x.codes.dtype == torch.int8 else torch.float32
    _product[grid](
        x.codes, x.scales, weight.codes, weight.scales, packed.bias, out,
        partials(grid, *out.shape, sums, device), packed.arrived,
        rows, weight.outputs, weight.inputs, x.codes.stride(0), *x.scales.stride(),
        **_constants(weight.format, weight.inputs, tile._replace(slices=grid[1])),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _constants(name: str, inputs: int, tile: Tile) -> dict[str, Any]:
    return {
        "GROUPED": name == "fp8_block",
        "FULL": inputs % tile.inputs == 0,
        "SLICED": tile.slices > 1,
        "BM": tile.rows,
        "BN": tile.outputs,
        "BK": tile.inputs,
    }


def specializations() -> list[Specialization]:
    """A 4096 x 4096 weight of each format at every size of tile that the rule takes."""
    return [
        _specialization(name, rows, card, arches)
        for name, places in (
            ("w8a8", ((16, H100, (80, 90, 100)), (64, H100, (90, 100)), (1024, H100, (90, 100)), (64, A100, (80,)))),
            ("fp8", ((16, H100, (90, 100)), (64, H100, (90, 100)), (1024, H100, (90, 100)))),
            ("fp8_block", ((16, H100, (90, 100)), (64, H100, (90, 100)), (1024, H100, (90, 100)))),
        )
        for rows, card, arches in places
    ]


def _specialization(name: str, rows: int, card: Card, arches: tuple[int, ...]) -> Specialization:
    tile = default_tile(f"linear_{name}", Shape(rows, 4096, 4096, 128), card)
    codes, sums = ("*i8:16", "*i32:16") if name == "w8a8" else ("*fp8e4nv:16", "*fp32:16")
    # One scale per row: the strides of its tensor are 1. One per row and block: the blocks' is.
    absent = {"bias": None, "stride_group": 1} | ({} if name == "fp8_block" else {"stride_row": 1})
    absent |= {"partial": None} if tile.slices == 1 else {}
    signature = {
        "x": codes, "x_scales": "*fp32:16", "codes": codes, "scales": "*fp32:16", "out": "*bf16:16",
        "partial": sums, "arrived": "*i32:16",
        "M": "i32", "N": "i32:16", "K": "i32:16", "stride_x": "i32:16", "stride_row": "i32",
    }  # fmt: skip
    return Specialization(
        name=f"{name}/{tile.rows}x{tile.outputs}/warps{tile.warps}",
        kernel=_product,
        signature={key: kind for key, kind in signature.items() if key not in absent},
        constexprs=_constants(name, 4096, tile) | absent,
        num_warps=tile.warps,
        num_stages=tile.stages,
        arches=arches,
        needs=("mma", "wide"),
    )
