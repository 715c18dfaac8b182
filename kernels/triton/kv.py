"""Writing keys and values into their pages, and moving slots and blocks of pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import KVSpec, LayerKV
from ..registry import implements
from .kv_codes import codes_of, store_heads
from .specialization import Specialization
from .support import on_gpu

_UNIT = 512  # words of a program that moves: 128 threads of 16 bytes


@triton.jit
def _write(
    k,
    v,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    slots,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    CODES: tl.constexpr,
):
    """All heads of a token's keys, or of its values. Grid: (tokens, 2)."""
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    if tl.program_id(1) == 0:
        store_heads(load_heads(k, token, k_row_stride, k_head_stride, CODES), k_pages, k_scales, slot, True, CODES)
    else:
        store_heads(load_heads(v, token, v_row_stride, v_head_stride, CODES), v_pages, v_scales, slot, False, CODES)


@triton.jit
def load_heads(x, token, row_stride, head_stride, CODES: tl.constexpr):
    """The heads of one token: [rows, columns] fp32, zeros where there is none."""
    head = tl.arange(0, CODES.rows)
    dims = tl.arange(0, CODES.columns)
    inside = (head < CODES.heads)[:, None] & (dims < CODES.head_dim)[None, :]
    address = x + token.to(tl.int64) * row_stride + head[:, None] * head_stride + dims[None, :]
    return tl.load(address, mask=inside, other=0.0).to(tl.float32)


@implements("kv_write", "triton", when=on_gpu)
def kv_write(k: Tensor, v: Tensor, cache: LayerKV, slot_mapping: Tensor) -> None:
    """See the reference. k and v may be slices of a wider row; entries of a head are neighbours."""
    if not len(slot_mapping):
        return
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    _write[(len(slot_mapping), 2)](
        k,
        v,
        *writable(cache),
        cache.k_scale,
        cache.v_scale,
        slot_mapping,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        codes_of(cache.spec),
        num_warps=4,
    )


def writable(cache: LayerKV) -> tuple[Tensor, Tensor]:
    """The pages of keys and values, fp8 as the bytes that `store_heads` makes."""
    if cache.k.dtype == torch.float8_e4m3fn:
        return cache.k.view(torch.uint8), cache.v.view(torch.uint8)
    return cache.k, cache.v


@triton.jit
def _move(source, target, sources, targets, words, UNIT: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr):
    """target[targets[i]] = source[sources[i]] for rows of words. Grid: (rows, units of a row).

    FROM, TO: whether there are indices on this side, else row i is meant.
    """
    i = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * UNIT + tl.arange(0, UNIT)
    from_row = tl.load(sources + i).to(tl.int64) if FROM else i
    to_row = tl.load(targets + i).to(tl.int64) if TO else i
    inside = word < words
    tl.store(target + to_row * words + word, tl.load(source + from_row * words + word, mask=inside), mask=inside)


def _move_all(tensors: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """row targets[i] = old row sources[i] of contiguous tensors: all sources are read before a target is written."""
    count = len(sources)
    if not count:
        return
    for tensor in tensors:
        rows = _as_words(tensor)
        words = rows.shape[1]
        kept = torch.empty((count, words), dtype=rows.dtype, device=rows.device)
        grid, unit = (count, triton.cdiv(words, _UNIT)), min(_UNIT, triton.next_power_of_2(words))
        _move[grid](rows, kept, sources, targets, words, unit, True, False)
        _move[grid](kept, rows, sources, targets, words, unit, False, True)


def _as_words(rows: Tensor) -> Tensor:
    """Rows of any dtype as rows of the widest integers that they are whole multiples of: [rows, words]."""
    as_bytes = rows.flatten(1).view(torch.uint8)
    width = next(size for size in (4, 2, 1) if as_bytes.shape[1] % size == 0)
    return as_bytes.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[width])


@implements("kv_compact", "triton", when=on_gpu)
def kv_compact(cache: LayerKV, src_slots: Tensor, dst_slots: Tensor) -> None:
    """See the reference."""
    _move_all([pages.flatten(0, 1) for pages in cache.per_slot], src_slots, dst_slots)


@implements("kv_copy_blocks", "triton", when=on_gpu)
def kv_copy_blocks(cache: LayerKV, src_blocks: Tensor, dst_blocks: Tensor) -> None:
    """See the reference."""
    _move_all(cache.per_slot, src_blocks, dst_blocks)


def specializations() -> list[Specialization]:
    """A token of 8 heads of 128 in every format; 16 bytes per thread where slots move."""
    strides = dict.fromkeys(("k_row_stride", "k_head_stride", "v_row_stride", "v_head_stride"), "i32:16")
    writes = [
        Specialization(
            name=f"write/{name}",
            kernel=_write,
            signature={"k": "*bf16:16", "v": "*bf16:16", "k_pages": pages, "v_pages": pages, "slots": "*i64:16"}
            | ({"k_scales": scale, "v_scales": scale} if scale else {})
            | strides,
            constexprs={"CODES": codes_of(KVSpec(16, 8, 128, name))}
            | ({} if scale else {"k_scales": None, "v_scales": None}),
            needs=("wide",),
        )
        for name, pages, scale in (
            ("bf16", "*bf16:16", None),
            ("fp8_e4m3", "*u8:16", "*fp32:16"),
            ("int8_per_token_head", "*i8:16", "*fp16:16"),
            ("int4_per_token_head", "*u8:16", "*fp16:16"),
        )
    ]
    tensors = {"source": "*i32:16", "target": "*i32:16", "sources": "*i64:16", "targets": "*i64:16", "words": "i32:16"}
    move = Specialization("move", _move, tensors, {"UNIT": _UNIT, "FROM": True, "TO": False}, needs=("wide",))
    return [*writes, move]
