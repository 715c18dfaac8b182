"""Products of plain activations with eight-bit weights (W8A16), with a scale per output or per group of inputs.

Codes (-127 .. 127) are exact in bf16 and fp16 and become so in registers, on their way from memory that has half the
bytes. Sums are scaled, not weights: after each group, or once at the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed import PackedWeight
from ..registry import implements
from ..tuning import A100, H100, Shape, Tile, default_tile, tile_for
from .slices import add_slices, arrivals, partials, programs
from .specialization import Specialization
from .support import INTERPRETED, for_dot, on_gpu
from .tiles import store_tile, tile_of


@triton.jit(do_not_specialize=["M"])
def _product(
    x, codes, scales, bias, out, partial, arrived, M, N, K, stride_x,
    PER_GROUP: tl.constexpr, FULL: tl.constexpr, SLICED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x [M, K], codes [N, K] int8, scales [G, N]. PER_GROUP: iterations per group, 0 = one scale per output.

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
    acc = tl.zeros((BM, BN), tl.float32)
    for block in range(first, last):
        if FULL:
            a = tl.load(x_at, mask=live[:, None], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0, eviction_policy=EVICT)
        else:
            there = (ks < K)[None, :]
            a = tl.load(x_at, mask=live[:, None] & there, other=0.0)
            w = tl.load(w_at, mask=inside[:, None] & there, other=0, eviction_policy=EVICT)
            ks += BK
        a = for_dot(a, INTERPRETED)
        w = tl.trans(w.to(a.dtype))
        if PER_GROUP == 0:
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        else:
            scale = tl.load(scales + (block // PER_GROUP) * N + cols, mask=inside, other=0.0).to(tl.float32)
            acc += tl.dot(a, w, input_precision=PRECISION) * scale[None, :]
        x_at += BK
        w_at += BK
    acc, mine = add_slices(acc, partial, arrived, tl.program_id(0), rows, cols, M, N, SLICED)
    if mine:
        if PER_GROUP == 0:
            acc *= tl.load(scales + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        store_tile(acc, out, bias, rows, cols, M, N)


class PackedInt8(NamedTuple):
    weight: PackedWeight
    bias: Tensor | None
    arrived: Tensor


def prepare(weight: PackedWeight, bias: Tensor | None) -> PackedInt8:
    weight = replace(weight, codes=weight.codes.contiguous(), scales=weight.scales.contiguous())
    return PackedInt8(weight, bias, arrivals(weight.codes.device))


@implements("linear_int8", "triton", when=on_gpu, prepare=prepare)
def linear_int8(x: Tensor, packed: Any) -> Tensor:
    """See the reference. The last dimension of x is contiguous; rows may be apart."""
    weight = packed.weight
    shape = Shape(x.shape[0], weight.outputs, weight.inputs, weight.group)
    return multiply(x, packed, tile_for("linear_int8", shape, x.device))


def multiply(x: Tensor, packed: PackedInt8, tile: Tile) -> Tensor:
    """x [T, K] -> [T, N] by a given tile."""
    weight = packed.weight
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    out = x.new_empty(x.shape[0], weight.outputs)
    if x.shape[0] == 0:
        return out
    grid = programs(tile, *out.shape)
    _product[grid](
        x, weight.codes, weight.scales, packed.bias, out,
        partials(grid, *out.shape, torch.float32, x.device), packed.arrived,
        x.shape[0], weight.outputs, weight.inputs, x.stride(0),
        **_constants(weight.inputs, weight.group, tile._replace(slices=grid[1]), x.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _constants(inputs: int, group: int, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    if group != inputs and group % tile.inputs:
        raise ValueError(f"a tile of {tile.inputs} inputs cuts groups of {group}; measure again with `quire tune`")
    return {
        "PER_GROUP": 0 if group == inputs else group // tile.inputs,
        "FULL": inputs % tile.inputs == 0,
        "SLICED": tile.slices > 1,
        "BM": tile.rows,
        "BN": tile.outputs,
        "BK": tile.inputs,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # of fp32 operands only
        "INTERPRETED": INTERPRETED,
    }


def specializations() -> list[Specialization]:
    """A 4096 x 4096 weight at every size of tile that the rule takes."""
    tensors = {
        "x": "*bf16:16", "codes": "*i8:16", "scales": "*fp32:16", "out": "*bf16:16",
        "partial": "*fp32:16", "arrived": "*i32:16",
    }  # fmt: skip
    sizes = {"M": "i32", "N": "i32:16", "K": "i32:16", "stride_x": "i32:16"}
    result = []
    for rows, group, card, arches in (
        (16, 4096, H100, (80, 90, 100)),
        (16, 128, H100, (80, 90, 100)),
        (64, 4096, H100, (90, 100)),
        (1024, 4096, H100, (90, 100)),
        (1024, 128, H100, (90, 100)),
        (64, 128, A100, (80,)),
    ):
        tile = default_tile("linear_int8", Shape(rows, 4096, 4096, group), card)
        absent = {"bias": None} | ({"partial": None} if tile.slices == 1 else {})
        result.append(
            Specialization(
                name=f"{tile.rows}x{tile.outputs}/warps{tile.warps}/g{group}",
                kernel=_product,
                signature={name: kind for name, kind in (tensors | sizes).items() if name not in absent},
                constexprs=_constants(4096, group, tile, torch.bfloat16) | {"INTERPRETED": False} | absent,
                num_warps=tile.warps,
                num_stages=tile.stages,
                arches=arches,
                needs=("mma", "wide"),
            )
        )
    return result
