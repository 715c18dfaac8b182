"""Writing, compacting and copying paged keys and values.

A slot is block · block_size + offset. Slots of block 0, the null block, may be written by padding and are never read.
"""

from __future__ import annotations

from torch import Tensor

from ..batch import LayerKV
from ..registry import op


@op
def kv_write(k: Tensor, v: Tensor, cache: LayerKV, slot_mapping: Tensor) -> None:
    """Store this step's keys and values [T, Hk, D] at slot_mapping [T]. Only null-block slots may repeat."""
    slots = slot_mapping.long()
    for new, pages in ((k, cache.k), (v, cache.v)):
        pages.flatten(0, 1)[slots] = new.to(pages.dtype)


@op
def kv_compact(cache: LayerKV, src_slots: Tensor, dst_slots: Tensor) -> None:
    """Move single slots, as after the verification of a draft tree: dst[i] = old src[i], for [N] slots.

    All sources are read before any destination is written, so the two sets may overlap.
    """
    for pages in (cache.k, cache.v):
        flat = pages.flatten(0, 1)
        flat[dst_slots.long()] = flat[src_slots.long()]


@op
def kv_copy_blocks(cache: LayerKV, src_blocks: Tensor, dst_blocks: Tensor) -> None:
    """Copy whole blocks, as before a write to a shared one: block dst[i] = old block src[i], for [N] blocks."""
    for pages in (cache.k, cache.v):
        pages[dst_blocks.long()] = pages[src_blocks.long()]
