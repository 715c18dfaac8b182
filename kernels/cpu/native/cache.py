"""Keys and values into the pages in any format, rotated on the way, and slots and blocks of pages elsewhere.

One pass over a step's rows rotates its queries and keys and writes keys and values with their scales (src/cache.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...batch import LayerKV
from ...reference.hadamard import is_power_of_two
from ...registry import implements
from .library import DTYPES, FORMATS, OUT_OF_MEMORY, OUT_OF_RANGE, Kernel, address, usable, usable_on_cache

_rope_kv_write = Kernel("rope_kv_write", "iiipppiiiiiiiiippiiippppip")
_move = Kernel("move", "iiipppp")
_hadamard = Kernel("hadamard", "iipiiiip")


@implements("kv_write", "native", when=usable_on_cache)
def kv_write(k: Tensor, v: Tensor, cache: LayerKV, slot_mapping: Tensor) -> None:
    """See the reference. IndexError for a slot that the cache lacks."""
    _write(k, k, v, None, None, False, cache, slot_mapping)


@implements("rope_kv_write", "native", when=usable_on_cache)
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    interleaved: bool,
    cache: LayerKV,
    slot_mapping: Tensor,
) -> Tensor:
    """See the reference. Overwrites q. IndexError for a position or a slot that there is not."""
    _write(q, k, v, positions, table, interleaved, cache, slot_mapping)
    return q


def _write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    table: Tensor | None,
    interleaved: bool,
    cache: LayerKV,
    slots: Tensor,
) -> None:
    """Without positions and a table nothing is rotated, and q is not looked at."""
    rows, heads, dim = k.shape
    q_row, q_head, _ = q.stride()
    k_row, k_head, _ = k.stride()
    v_row, v_head, _ = v.stride()
    blocks, block_size = cache.k.shape[:2]
    table_rows, rotary_dim = (0, 0) if table is None else table.shape
    status = _rope_kv_write(
        rows,
        DTYPES[k.dtype],
        FORMATS[cache.spec.format],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q.shape[1],
        heads,
        q_row,
        q_head,
        k_row,
        k_head,
        v_row,
        v_head,
        dim,
        address(positions),
        address(table),
        table_rows,
        rotary_dim,
        interleaved,
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        address(cache.k_scale),
        address(cache.v_scale),
        blocks * block_size,
        slots.data_ptr(),
    )
    if status == OUT_OF_MEMORY:
        raise MemoryError("rope_kv_write: no memory for a row")
    if status == OUT_OF_RANGE:
        limits = [f"slots {slots.aminmax()} are outside of the cache of {blocks * block_size}"]
        if positions is not None:
            limits.append(f"positions {positions.aminmax()} are outside of the rope table of {table_rows} rows")
        raise IndexError(", or ".join(limits))


# Bytes that one thread has moved before another has woken up: 4 KiB take it 10 us and two 19, 64 KiB 24 and 43, 256 KiB
# 180 and 122.
ONE_THREAD_MOVES = 1 << 16


@implements("kv_compact", "native", when=usable_on_cache)
def kv_compact(cache: LayerKV, src_slots: Tensor, dst_slots: Tensor) -> None:
    """See the reference. IndexError for a slot that the cache lacks."""
    blocks, block_size = cache.k.shape[:2]
    _move_units(cache, blocks * block_size, src_slots, dst_slots, "slots")


@implements("kv_copy_blocks", "native", when=usable_on_cache)
def kv_copy_blocks(cache: LayerKV, src_blocks: Tensor, dst_blocks: Tensor) -> None:
    """See the reference. IndexError for a block that the cache lacks."""
    _move_units(cache, cache.k.shape[0], src_blocks, dst_blocks, "blocks")


def _move_units(cache: LayerKV, units: int, source: Tensor, target: Tensor, what: str) -> None:
    source, target = source.long().contiguous(), target.long().contiguous()
    for pages in cache.per_slot:
        size = pages.nbytes // units
        between = torch.empty(len(source) * size, dtype=torch.uint8)
        ends = (source.data_ptr(), target.data_ptr(), between.data_ptr())
        threads = 1 if between.nbytes <= ONE_THREAD_MOVES else None
        if _move(len(source), size, units, pages.data_ptr(), *ends, threads=threads):
            raise IndexError(
                f"{what} {source.aminmax()} or {target.aminmax()} are outside of the cache of {units} {what}"
            )


@implements("hadamard", "native", when=usable)
def hadamard(x: Tensor) -> Tensor:
    """See the reference."""
    size = x.shape[-1]
    if not is_power_of_two(size):
        raise ValueError(f"the rotation needs a power of two, the last dimension is {size}")
    if x.dtype not in DTYPES:
        return hadamard(x.float()).to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    heads = x if x.dim() == 3 and x.stride(-1) == 1 else x.reshape(-1, 1, size).contiguous()
    row, head, _ = heads.stride()
    status = _hadamard(
        heads.shape[0], DTYPES[x.dtype], heads.data_ptr(), heads.shape[1], row, head, size, out.data_ptr()
    )
    if status == OUT_OF_MEMORY:
        raise MemoryError("hadamard: no memory for a row")
    return out
