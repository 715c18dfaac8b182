"""Paged attention without a gather: all rows of a step in one call, keys and values read where they lie.

src/attention.h has the method. A row's bits do not depend on its batch-mates, on the number of threads, or on how its
sequence was cut into chunks.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...batch import LayerKV, RaggedBatch
from ...registry import implements
from .library import DTYPES, OUT_OF_MEMORY, OUT_OF_RANGE, function, usable_on_cache

_attention = function("attention")


class _Batch(ctypes.Structure):
    """`Batch` of src/kernels.h."""

    _fields_ = (
        ("cu_q", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("table_width", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        ("tree_mask", ctypes.c_void_p),
        ("num_seqs", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
    )


class NativePlan(NamedTuple):
    address: int  # of the structure
    structure: _Batch
    tensors: tuple[Tensor | None, ...]  # what it points to


def prepare_attention(batch: RaggedBatch, block_size: int, window: int | None) -> NativePlan:
    """Once per step and window size; see the reference for what the window means."""
    cu_q, seq_lens, table = batch.cu_q.contiguous(), batch.seq_lens.contiguous(), batch.block_table.contiguous()
    positions = batch.positions.contiguous()
    trees = None if batch.tree_mask is None else batch.tree_mask.contiguous()
    structure = _Batch(
        cu_q.data_ptr(),
        seq_lens.data_ptr(),
        table.data_ptr(),
        table.shape[1],
        positions.data_ptr(),
        None if trees is None else trees.data_ptr(),
        seq_lens.shape[0],
        batch.num_tokens,
        block_size,
        window or 0,
    )
    return NativePlan(ctypes.addressof(structure), structure, (cu_q, seq_lens, table, positions, trees))


@implements("attention", "native", when=usable_on_cache, prepare=prepare_attention)
def attention(
    q: Tensor, cache: LayerKV, plan: Any, scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See the reference. Products in bf16 with fp32 sums where there is AMX and all is bf16, else in fp32.

    IndexError for a block that the table or the cache lacks.
    """
    rows, heads, dim = q.shape
    keys = cache.k
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((rows, heads), dtype=torch.float32)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    status = _attention(
        plan.address,
        DTYPES[q.dtype],
        DTYPES[keys.dtype],
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        keys.data_ptr(),
        cache.v.data_ptr(),
        keys.shape[0],
        heads,
        keys.shape[2],
        dim,
        scale,
        softcap,
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
    )
    if status == OUT_OF_RANGE:
        raise IndexError(f"a sequence reads past its block table, or a block outside of the cache of {keys.shape[0]}")
    if status == OUT_OF_MEMORY:
        raise MemoryError("attention: no memory for the working buffers")
    return out, lse
