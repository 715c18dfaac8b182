"""Memory for packed weights on large pages: a step reads all of it, and 4 KiB pages are looked up every 64 lines.

Weights are laid end to end in chunks, so that a large page holds several small ones. A chunk goes when the last tensor
in it does.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

CHUNK = 64 << 20
SMALL = 64 << 10  # bytes: below, torch's own memory is as good
ALIGNMENT = 64  # a cache line, and a row of a matrix tile

_chunk: mmap.mmap | None = None
_used = 0


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor, its contents arbitrary, on 2 MiB pages where the system has them."""
    global _chunk, _used
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL:
        return torch.empty(shape, dtype=dtype)
    if size > CHUNK // 2:
        return _view(_map(size), 0, size, shape, dtype)
    if _chunk is None or _used + size > CHUNK:
        _chunk, _used = _map(CHUNK), 0
    start, _used = _used, -(-(_used + size) // ALIGNMENT) * ALIGNMENT
    return _view(_chunk, start, size, shape, dtype)


def _map(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _view(memory: mmap.mmap, start: int, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(dtype).view(shape)
