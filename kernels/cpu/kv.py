"""Slot-wise writes on the flat view [num_blocks * block_size, Hk * D] of a layer's cache."""

from __future__ import annotations

from torch import Tensor

from ..batch import LayerKV
from ..registry import Target, implements, on


def plain(target: Target) -> str | None:
    """The predicate of what writes unquantized caches on the CPU."""
    if target.kv_format not in ("bf16", "fp16", "fp32"):
        return f"writes plain keys and values, the cache holds {target.kv_format}"
    return on("cpu")(target)


@implements("kv_write", "cpu", when=plain)
def kv_write(k: Tensor, v: Tensor, cache: LayerKV, slot_mapping: Tensor) -> None:
    """See the reference. 4 µs for a row of two heads of 64 where that takes 8."""
    for new, pages in ((k, cache.k), (v, cache.v)):
        pages.view(-1, k.shape[1] * k.shape[2]).index_copy_(0, slot_mapping, new.flatten(1).to(pages.dtype))
