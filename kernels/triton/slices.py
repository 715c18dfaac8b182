"""Sums over slices of the inputs, where there are too few output tiles to keep a card busy.

Every slice writes its partial sum; the program that finds that all others of its tile have arrived adds them up, in
the order of the slices. Which program that is decides nothing about the result, and no second launch is paid for (1 to
2 µs, where the product itself takes 4 to 20).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Tile

COUNTERS = 1024  # output tiles that can be in slices; with more there is work for every multiprocessor anyway


def arrivals(device: torch.device) -> Tensor:
    """One counter per output tile, 0 between products. One weight's products must not run on two streams at once."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def programs(tile: Tile, rows: int, outputs: int) -> tuple[int, int]:
    """The grid: (output tiles, slices)."""
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    return tiles, tile.slices if tiles <= COUNTERS else 1


def partials(grid: tuple[int, int], rows: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Where slices leave their sums, None where there is one."""
    return None if grid[1] == 1 else torch.empty(grid[1], rows, outputs, dtype=dtype, device=device)


@triton.jit
def add_slices(acc, partial, arrived, tile, rows, cols, M, N, SLICED: tl.constexpr):
    """(sum over all slices, is it mine to store): acc [BM, BN] is slice tl.program_id(1) of output tile `tile`.

    The grid's second dimension is the slices; SLICED: there are several. partial [slices, M, N]; arrived[tile] is 0
    before and after.
    """
    if not SLICED:
        mine = True
    else:
        at = partial + rows.to(tl.int64)[:, None] * N + cols[None, :]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        size = tl.cast(M, tl.int64) * N
        tl.store(at + tl.program_id(1) * size, acc, mask=inside)
        tl.debug_barrier()  # all threads have written before one of them tells
        mine = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == tl.num_programs(1) - 1
        if mine:
            tl.store(arrived + tile, 0)
            acc = tl.zeros_like(acc)
            for _ in range(tl.num_programs(1)):
                # From L2, where the others' sums are: this multiprocessor's L1 does not know of them.
                acc += tl.load(at, mask=inside, other=0, cache_modifier=".cg")
                at += size
    return acc, mine
