"""Writing, compacting and copying paged keys and values.

A slot is block · block_size + offset. Slots of block 0, the null block, may be written by padding and are never read.
"""

from __future__ import annotations

from torch import Tensor

from ..batch import LayerKV
from ..registry import op
from .hadamard import hadamard


@op
def kv_write(k: Tensor, v: Tensor, cache: LayerKV, slot_mapping: Tensor) -> None:
    """Store this step's keys and values [T, Hk, D] at slot_mapping [T], in the cache's format.

    Keys are rotated first where the format says so. Only null-block slots may repeat.
    """
    coding, slots = cache.spec.coding, slot_mapping.long()
    if coding.rotates_keys:
        k = hadamard(k.float())
    for new, pages, scale in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        codes, token_scale = coding.encode(new.float(), scale if coding.scale == "static" else None)
        pages.flatten(0, 1)[slots] = codes
        if scale is not None and token_scale is not None:
            scale.flatten(0, 1)[slots] = token_scale


@op
def kv_compact(cache: LayerKV, src_slots: Tensor, dst_slots: Tensor) -> None:
    """Move single slots, as after the verification of a draft tree: dst[i] = old src[i], for [N] slots.

    All sources are read before any destination is written, so the two sets may overlap.
    """
    for pages in cache.per_slot:
        flat = pages.flatten(0, 1)
        flat[dst_slots.long()] = flat[src_slots.long()]


@op
def kv_copy_blocks(cache: LayerKV, src_blocks: Tensor, dst_blocks: Tensor) -> None:
    """Copy whole blocks, as before a write to a shared one: block dst[i] = old block src[i], for [N] blocks."""
    for pages in cache.per_slot:
        pages[dst_blocks.long()] = pages[src_blocks.long()]
