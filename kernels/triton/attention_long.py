"""Attention of sequences with many rows: large tiles of queries, each going over its keys alone.

A tile is block_m queries of one sequence and KV head, heads before rows: the query heads of a KV head share its keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tile import STEPWISE, attend, load_queries, nothing_seen, static_scale, store_result
from .kv_pages import head_dims


def num_tiles(tokens: int, seqs: int, group: int, block_m: int) -> int:
    """Programs per KV head that are enough for so many rows of so many sequences, however they are divided."""
    return tokens * group // block_m + seqs


@triton.jit
def owner_of(tile, cu_rows, first, last, FORM: tl.constexpr):
    """(i, query): to which of the owners first .. last of rows cu_rows[i] .. cu_rows[i + 1] - 1 a tile belongs.

    query: the tile's first one, counted from the owner's first; it may lie behind the last one.
    """
    origin = tl.load(cu_rows + first)
    low = first
    high = last
    while low < high:  # the last one whose first tile is not behind this one
        middle = (low + high + 1) // 2
        if _first_tile(cu_rows, middle, first, origin, FORM) <= tile:
            low = middle
        else:
            high = middle - 1
    return low, (tile - _first_tile(cu_rows, low, first, origin, FORM)) * FORM.block_m


@triton.jit
def _first_tile(cu_rows, i, first, origin, FORM: tl.constexpr):
    """The first tile of an owner, where each one before may have left a tile partly filled."""
    return (tl.load(cu_rows + i) - origin) * FORM.group // FORM.block_m + i - first


@triton.jit(do_not_specialize=STEPWISE)
def long(
    q,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    sinks,
    out,
    lse,
    cu_q,
    seq_lens,
    positions,
    tree_mask,
    block_table,
    q_row_stride,
    q_head_stride,
    table_stride,
    window,
    factor,
    softcap,
    short_seqs,
    num_seqs,
    FORM: tl.constexpr,
):
    """One tile. Grid: (kv_heads, num_tiles); the sequences are short_seqs .. num_seqs - 1.

    The last tiles come first: in a prompt they have the most keys, and what starts last should be soon done.
    """
    BLOCK_M: tl.constexpr = FORM.block_m
    PAGES: tl.constexpr = FORM.pages
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq, first_query = owner_of(tile, cu_q, short_seqs, num_seqs - 1, FORM)
    first_row = tl.load(cu_q + seq)
    rows = tl.load(cu_q + seq + 1) - first_row
    if first_query < rows * FORM.group:
        seq_len = tl.load(seq_lens + seq)
        context = seq_len - rows
        query = first_query + tl.arange(0, BLOCK_M)
        offset = query // FORM.group
        q_head = head * FORM.group + query % FORM.group
        valid = offset < rows
        row = first_row + offset
        last = tl.where(valid, context + offset, -1)
        oldest = last
        tree = tl.zeros([BLOCK_M], tl.int64)
        # Keys before `whole` are seen by every row, from `end` on by none.
        first = 0
        if FORM.tree:
            tree = tl.load(tree_mask + row, mask=valid, other=0)
            whole = context
            end = seq_len
        else:
            whole = context + first_query // FORM.group + 1
            end = tl.minimum(context + (first_query + BLOCK_M - 1) // FORM.group + 1, seq_len)
        if FORM.window:
            oldest = tl.load(positions + row, mask=valid, other=0).to(tl.int32) - window + 1
            first = tl.maximum(tl.min(tl.where(valid, oldest, end)), 0)
            whole = first
        whole = first + tl.maximum(tl.minimum(whole, end) - first, 0) // FORM.block_n * FORM.block_n
        queries = load_queries(q, row, q_head, valid, q_row_stride, q_head_stride, FORM)
        table = block_table + seq.to(tl.int64) * table_stride
        score_factor = factor * static_scale(k_scales, head, FORM)
        state = nothing_seen(FORM)
        if not FORM.window:
            state = attend(
                queries,
                head,
                (last, oldest, tree),
                context,
                first,
                whole,
                k_pages,
                v_pages,
                k_scales,
                v_scales,
                table,
                score_factor,
                softcap,
                state,
                FORM,
                False,
            )
        acc, m, l = attend(
            queries,
            head,
            (last, oldest, tree),
            context,
            whole,
            end,
            k_pages,
            v_pages,
            k_scales,
            v_scales,
            table,
            score_factor,
            softcap,
            state,
            FORM,
            True,
        )
        state = (acc * static_scale(v_scales, head, FORM), m, l)
        store_result(out, lse, row, q_head, valid, head_dims(PAGES), state, sinks, FORM)
