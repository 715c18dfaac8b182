"""Paged attention without a gather: all rows of a step in one call, keys and values read where they lie.

src/attention.h has the method. A row's bits do not depend on its batch-mates, on the number of threads, on how its
sequence was cut into chunks, or on whether it shares its prefix's reading with others (src/tasks.h).
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...batch import LayerKV, RaggedBatch, SharedPrefix
from ...registry import implements
from .library import DTYPES, FORMATS, OUT_OF_MEMORY, OUT_OF_RANGE, Kernel, address, usable_on_cache

_attention = Kernel("attention", "ipiipiippppiiiiffppp")
_steps = itertools.count()


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
        ("first_member", ctypes.c_void_p),
        ("members", ctypes.c_void_p),
        ("shared_keys", ctypes.c_void_p),
        ("num_groups", ctypes.c_int64),
        ("step", ctypes.c_int64),
    )


class NativePlan(NamedTuple):
    address: int  # of the structure
    structure: _Batch
    tensors: tuple[Tensor | None, ...]  # what it points to


def prepare_attention(batch: RaggedBatch, block_size: int, window: int | None) -> NativePlan:
    """Once per step and window size; see the reference for what the window means.

    Rows with a window read their own keys: of a prefix long enough to be shared, few lie within a usual window.
    """
    groups = batch.shared if window is None else ()
    tensors = (
        batch.cu_q.contiguous(),
        batch.seq_lens.contiguous(),
        batch.block_table.contiguous(),
        batch.positions.contiguous(),
        None if batch.tree_mask is None else batch.tree_mask.contiguous(),
        *_lists(groups, block_size),
    )
    cu_q, seq_lens, table, positions, trees, first_member, members, keys = (
        None if tensor is None else tensor.data_ptr() for tensor in tensors
    )
    structure = _Batch(
        cu_q,
        seq_lens,
        table,
        batch.block_table.shape[1],
        positions,
        trees,
        batch.num_seqs,
        batch.num_tokens,
        block_size,
        window or 0,
        first_member,
        members,
        keys,
        len(groups),
        next(_steps),
    )
    return NativePlan(ctypes.addressof(structure), structure, tensors)


def overlay(plan: NativePlan, new: NativePlan) -> None:
    """Make what points to `plan` see `new`, for as long as both are kept."""
    ctypes.memmove(plan.address, new.address, ctypes.sizeof(_Batch))


def _lists(groups: tuple[SharedPrefix, ...], block_size: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """first_member, members and shared_keys of the structure."""
    if not groups:
        return None, None, None
    return (
        torch.tensor(list(itertools.accumulate((len(group.seqs) for group in groups), initial=0))),
        torch.tensor([seq for group in groups for seq in group.seqs]),
        torch.tensor([group.num_blocks * block_size for group in groups]),
    )


@implements("attention", "native", when=usable_on_cache, prepare=prepare_attention)
def attention(
    q: Tensor, cache: LayerKV, plan: Any, scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See the reference. In bf16 with fp32 sums where there is AMX, q is bf16 and the cache not fp32; else in fp32.

    IndexError for a block that the table or the cache lacks, and for a group that is none.
    """
    rows, heads, dim = q.shape
    keys = cache.k
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((rows, heads), dtype=torch.float32)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    status = _attention(
        rows,
        plan.address,
        DTYPES[q.dtype],
        FORMATS[cache.spec.format],
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        keys.data_ptr(),
        cache.v.data_ptr(),
        address(cache.k_scale),
        address(cache.v_scale),
        keys.shape[0],
        heads,
        keys.shape[2],
        dim,
        scale,
        softcap,
        address(sinks),
        out.data_ptr(),
        lse.data_ptr(),
    )
    if status == OUT_OF_RANGE:
        raise IndexError(
            f"a sequence reads past its block table, or a block outside of the cache of {keys.shape[0]}, "
            f"or is given a shared prefix that it cannot have"
        )
    if status == OUT_OF_MEMORY:
        raise MemoryError("attention: no memory for the working buffers")
    return out, lse
