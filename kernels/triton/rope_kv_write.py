"""Rotary embedding of queries and keys and the write of keys and values in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import KVSpec, LayerKV
from ..registry import implements
from .kv import load_heads, writable
from .kv_codes import Codes, codes_of, store_heads
from .specialization import Specialization
from .support import on_gpu


@triton.jit
def _rope_kv_write(
    q,
    k,
    v,
    turned,
    positions,
    table,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    slots,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    CODES: tl.constexpr,
    QUERIES: tl.constexpr,
    Q_TILES: tl.constexpr,
    Q_HEADS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """A token's keys, its values, or a tile of its query heads. Grid: (tokens, 2 + Q_TILES).

    QUERIES: as CODES, for a tile of query heads; turned [T, Q_HEADS, head_dim].
    """
    KV_HEADS: tl.constexpr = CODES.heads
    token = tl.program_id(0)
    part = tl.program_id(1)
    angles = (tl.load(positions + token), table)
    if part == 0:
        keys = _rotate(k, token, 0, k_row_stride, k_head_stride, angles, CODES, KV_HEADS, ROTARY_DIM, INTERLEAVED)
        store_heads(keys, k_pages, k_scales, tl.load(slots + token).to(tl.int64), True, CODES)
    elif part == 1:
        values = load_heads(v, token, v_row_stride, v_head_stride, CODES)
        store_heads(values, v_pages, v_scales, tl.load(slots + token).to(tl.int64), False, CODES)
    else:
        first = (part - 2) * QUERIES.rows
        x = _rotate(q, token, first, q_row_stride, q_head_stride, angles, QUERIES, Q_HEADS, ROTARY_DIM, INTERLEAVED)
        head = first + tl.arange(0, QUERIES.rows)
        dims = tl.arange(0, QUERIES.columns)
        place = token.to(tl.int64) * Q_HEADS + head
        inside = (head < Q_HEADS)[:, None] & (dims < QUERIES.head_dim)[None, :]
        address = turned + place[:, None] * QUERIES.head_dim + dims[None, :]
        tl.store(address, x.to(turned.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x,
    token,
    first,
    row_stride,
    head_stride,
    angles,
    SHAPE: tl.constexpr,
    HEADS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The heads from `first` on of a token, rotated, as x's dtype holds them: [rows, columns] fp32.

    Every entry also loads the one it is turned with, which is in the cache line that its neighbours have loaded.
    """
    head = first + tl.arange(0, SHAPE.rows)
    dims = tl.arange(0, SHAPE.columns)
    HALF: tl.constexpr = ROTARY_DIM // 2
    rotates = dims < ROTARY_DIM
    if INTERLEAVED:
        angle = dims // 2
        second = dims % 2 == 1
        other = dims ^ 1
    else:
        angle = dims % HALF
        second = dims >= HALF
        other = tl.where(second, dims - HALF, dims + HALF)
    position, table = angles
    row = table + position.to(tl.int64) * ROTARY_DIM
    cos = tl.load(row + angle, mask=rotates, other=1.0)
    sin = tl.load(row + HALF + angle, mask=rotates, other=0.0)
    there = (head < HEADS)[:, None]
    heads = x + token.to(tl.int64) * row_stride + head[:, None] * head_stride
    own = tl.load(heads + dims[None, :], mask=there & (dims < SHAPE.head_dim)[None, :], other=0.0).to(tl.float32)
    partner = tl.load(heads + other[None, :], mask=there & rotates[None, :], other=0.0).to(tl.float32)
    turned = own * cos[None, :] + partner * tl.where(second, sin, -sin)[None, :]
    return turned.to(x.dtype.element_ty).to(tl.float32)


@implements("rope_kv_write", "triton", when=on_gpu)
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
    """See the reference. q, k and v may be slices of a wider row; k stays as it is."""
    tokens, heads, head_dim = q.shape
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return turned
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    queries = query_tile(heads, head_dim)
    tiles = triton.cdiv(heads, queries.rows)
    _rope_kv_write[(tokens, 2 + tiles)](
        q,
        k,
        v,
        turned,
        positions,
        table,
        *writable(cache),
        cache.k_scale,
        cache.v_scale,
        slot_mapping,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        codes_of(cache.spec),
        queries,
        tiles,
        heads,
        table.shape[1],
        interleaved,
        num_warps=4,
    )
    return turned


_Q_ENTRIES = 2048  # of a tile of query heads: 16 per thread


def query_tile(heads: int, head_dim: int) -> Codes:
    """The shape of a tile of query heads."""
    columns = triton.next_power_of_2(head_dim)
    return Codes(0, min(heads, max(1, _Q_ENTRIES // columns)), head_dim)


def specializations() -> list[Specialization]:
    """32 query and 8 KV heads of 128, in the format without codes and in the one with most of them."""
    heads = dict.fromkeys(("q", "k", "v", "turned"), "*bf16:16")
    strides = {f"{x}_{step}_stride": "i32:16" for x in "qkv" for step in ("row", "head")}
    return [
        Specialization(
            name=name,
            kernel=_rope_kv_write,
            signature=heads
            | {"positions": "*i64:16", "table": "*fp32:16", "k_pages": pages, "v_pages": pages, "slots": "*i64:16"}
            | ({"k_scales": scale, "v_scales": scale} if scale else {})
            | strides,
            constexprs={
                "CODES": codes_of(KVSpec(16, 8, 128, name)),
                "QUERIES": query_tile(32, 128),
                "Q_TILES": 2,
                "Q_HEADS": 32,
                "ROTARY_DIM": 128,
                "INTERLEAVED": False,
            }
            | ({} if scale else {"k_scales": None, "v_scales": None}),
            needs=("wide",),
        )
        for name, pages, scale in (("bf16", "*bf16:16", None), ("int4_per_token_head", "*u8:16", "*fp16:16"))
    ]
