"""Choices of tokens, put in order by expert, on the device: what a grouped product walks over.

    ids [T, k] ──▶ order: the choices t·k + j of expert 0, then of 1, ..., each list filled up to whole row tiles
                   experts: whose each row tile is; tiles: how many there are

Memory and grids come from T·k and E alone; that is all a host knows without waiting for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialization import Specialization

# Choices that a program looks at together: decodes have few, and 16 per thread keep a prompt's scan short.
_CHUNKS = ((1024, 4), (4096, 8))


class Alignment(NamedTuple):
    """n = T · k choices in order of their experts, each expert's in their own order, so that results repeat."""

    order: Tensor  # [max_tiles · BM] int32, n where a tile has no more choices
    experts: Tensor  # [max_tiles] int32
    tiles: Tensor  # [1] int32: row tiles in use; what is beyond them was never written

    @property
    def max_tiles(self) -> int:
        return self.experts.shape[0]


@triton.jit(do_not_specialize=["n"])  # one compiled form for every number of tokens
def _align(ids, order, owners, tiles, n, num_experts, BM: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """Program e: the tiles of expert e. Each counts all choices itself, which is cheaper than a second launch."""
    expert = tl.program_id(0)
    index = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, n, CHUNK):
        chosen = tl.load(ids + start + index, mask=start + index < n, other=num_experts).to(tl.int32)
        counts += tl.histogram(chosen, BINS)
    bins = tl.arange(0, BINS)
    needed = tl.where(bins < num_experts, (counts + BM - 1) // BM, 0)
    first = tl.sum(tl.where(bins < expert, needed, 0))
    own = tl.sum(tl.where(bins == expert, needed, 0))
    if expert == 0:
        tl.store(tiles, tl.sum(needed))

    found = 0
    for start in range(0, n, CHUNK):
        chosen = tl.load(ids + start + index, mask=start + index < n, other=num_experts).to(tl.int32)
        mine = chosen == expert
        place = first * BM + found + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + place, start + index, mask=mine)
        found += tl.sum(mine.to(tl.int32))
    rest = found + tl.arange(0, BM)
    tl.store(order + first * BM + rest, n, mask=rest < own * BM)
    for tile in range(0, own):
        tl.store(owners + first + tile, expert)


def max_tiles(choices: int, num_experts: int, rows: int) -> int:
    """The most tiles of so many rows that the choices can need: each expert that is chosen wastes rows - 1 at most."""
    return (choices + min(choices, num_experts) * (rows - 1)) // rows


def align(ids: Tensor, num_experts: int, rows: int) -> Alignment:
    """ids [T, k] integers in 0 .. num_experts - 1, contiguous and not empty; rows: of a tile, a power of two."""
    n = ids.numel()
    most = max_tiles(n, num_experts, rows)
    order, owners, tiles = (torch.empty(size, dtype=torch.int32, device=ids.device) for size in (most * rows, most, 1))
    chunk, warps = _CHUNKS[n > _CHUNKS[0][0]]
    _align[(num_experts,)](
        ids, order, owners, tiles, n, num_experts, BM=rows, CHUNK=chunk, BINS=_bins(num_experts), num_warps=warps
    )
    return Alignment(order, owners, tiles)


def _bins(num_experts: int) -> int:
    """One for each expert and one for what is no choice; a histogram has at least a warp of them."""
    return max(32, triton.next_power_of_2(num_experts + 1))


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: decodes and prompts of 128 experts."""
    tensors = {"ids": "*i64:16", "order": "*i32:16", "owners": "*i32:16", "tiles": "*i32:16"}
    return [
        Specialization(
            name=f"chunk{chunk}/m{rows}",
            kernel=_align,
            signature=tensors | {"n": "i32", "num_experts": "i32:16"},
            constexprs={"BM": rows, "CHUNK": chunk, "BINS": _bins(128)},
            num_warps=warps,
        )
        for (chunk, warps), rows in zip(_CHUNKS, (16, 128), strict=True)
    ]
