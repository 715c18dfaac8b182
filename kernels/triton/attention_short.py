"""Attention of sequences with few rows: their keys are split over programs, and the parts are merged.

    program (KV head, tile of its queries; segment of the keys; sequence) ─▶ acc, m, l ─▶ reduce ─▶ o, lse

All query heads of a KV head and all rows of the sequence share one reading of its keys. How a sequence is split and
tiled depends on itself alone, so a row's bits do not depend on its batch-mates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tile import (
    NOTHING,
    STEPWISE,
    attend,
    load_queries,
    nothing_seen,
    static_scale,
    store_part,
    store_result,
)
from .kv_pages import head_dims

# Keys of a segment. Its state, written and read again, is 3 % of the bytes of 512 keys (bf16, groups of 4, heads of
# 128), and 64 sequences of 4,096 keys are 512 segments per KV head: several times what is resident on a large GPU.
SEGMENT = tl.constexpr(512)
# Above SEGMENT · SEGMENTS keys the segments grow instead: one sequence on 8 KV heads then has 512 programs, two waves.
SEGMENTS = tl.constexpr(64)
NARROW = tl.constexpr(16)  # queries of a tile for one or two rows: the least that a matrix product takes
_CHUNK = tl.constexpr(16)  # states that the reduction loads at once


def segments(num_keys: int) -> int:
    """Over how many programs a sequence's visible keys are split."""
    growth = max(1, -(-num_keys // (SEGMENT.value * SEGMENTS.value)))
    return max(1, -(-num_keys // (SEGMENT.value * growth)))


def most_segments(num_keys: int) -> int:
    """The largest value of `segments` up to so many keys."""
    return max(1, min(SEGMENTS.value, -(-num_keys // SEGMENT.value)))


@triton.jit
def segment_keys(num_keys):
    """Keys of each segment but the last; see `segments`."""
    return SEGMENT * tl.maximum(1, tl.cdiv(num_keys, SEGMENT * SEGMENTS))


@triton.jit
def _split(seq, rows, seq_len, shared_keys, window, FORM: tl.constexpr, SHARED: tl.constexpr):
    """(first, keys, before, count): the first key that the sequence reads by itself, keys of a segment, states, parts.

    The keys that it reads with others (attention_shared.py) come first, and so do their states.
    """
    first = 0
    before = 0
    if SHARED:
        first = tl.load(shared_keys + seq)
        before = tl.cdiv(first, segment_keys(first))
    if FORM.window:  # a key that no row sees is not read: its block may belong to somebody else
        first = tl.maximum(first, seq_len - rows - window + 1)
    own = tl.maximum(seq_len - first, 0)
    keys = segment_keys(own)
    return first, keys, before, tl.maximum(1, tl.cdiv(own, keys))


@triton.jit(do_not_specialize=STEPWISE)
def short(
    q,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    sinks,
    out,
    lse,
    part_acc,
    part_m,
    part_l,
    cu_q,
    seq_lens,
    positions,
    tree_mask,
    block_table,
    shared_keys,
    q_row_stride,
    q_head_stride,
    table_stride,
    window,
    factor,
    softcap,
    parts,
    tiles,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    SHARED: tl.constexpr,
):
    """One segment of one sequence for the queries of one KV head. Grid: (kv_heads · tiles, segments, sequences).

    Neighbouring programs read neighbouring heads of the same slots. parts: states there is room for per row and head.
    FORM: with tiles of NARROW queries; WIDE: with larger ones, None where no sequence has more.
    """
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    segment = tl.program_id(1)
    seq = tl.program_id(2)
    row = tl.load(cu_q + seq)
    rows = tl.load(cu_q + seq + 1) - row
    seq_len = tl.load(seq_lens + seq)
    first, keys, before, count = _split(seq, rows, seq_len, shared_keys, window, FORM, SHARED)
    queries = rows * FORM.group
    begin = first + segment * keys
    span = (row, rows, seq_len, begin, tl.minimum(begin + keys, seq_len), before + segment, before + count)
    cache = (k_pages, v_pages, k_scales, v_scales, block_table + seq.to(tl.int64) * table_stride)
    results = (sinks, out, lse, part_acc, part_m, part_l, parts)
    masks = (positions, tree_mask, window)
    numbers = (factor, softcap)
    strides = (q_row_stride, q_head_stride)
    # The tile's height, too, depends on the sequence alone: another one sums in another order.
    here = segment < count
    if here & (queries <= NARROW) & (tile == 0):
        _part(q, strides, head, 0, span, cache, masks, numbers, results, FORM)
    if WIDE is not None:  # noqa: SIM102 - the compiler knows the one, the device the other
        if here & (queries > NARROW) & (tile * WIDE.block_m < queries):
            _part(q, strides, head, tile, span, cache, masks, numbers, results, WIDE)


@triton.jit
def _part(
    q,
    strides,
    head,
    tile,
    span,
    cache,
    masks,
    numbers,
    results,
    FORM: tl.constexpr,
):
    M: tl.constexpr = FORM.block_m
    PAGES: tl.constexpr = FORM.pages
    row_stride, head_stride = strides
    first_row, rows, seq_len, begin, end, place, places = span
    k_pages, v_pages, k_scales, v_scales, table = cache
    positions, tree_mask, window = masks
    factor, softcap = numbers
    sinks, out, lse, part_acc, part_m, part_l, parts = results

    query = tile * M + tl.arange(0, M)  # heads before rows
    offset = query // FORM.group
    q_head = head * FORM.group + query % FORM.group
    valid = offset < rows
    row = first_row + offset
    context = seq_len - rows
    last = tl.where(valid, context + offset, -1)
    oldest = last
    tree = tl.zeros([M], tl.int64)
    if FORM.window:
        oldest = tl.load(positions + row, mask=valid, other=0).to(tl.int32) - window + 1
    if FORM.tree:
        tree = tl.load(tree_mask + row, mask=valid, other=0)
    queries = load_queries(q, row, q_head, valid, row_stride, head_stride, FORM)
    acc, m, l = attend(
        queries,
        head,
        (last, oldest, tree),
        context,
        begin,
        end,
        k_pages,
        v_pages,
        k_scales,
        v_scales,
        table,
        factor * static_scale(k_scales, head, FORM),
        softcap,
        nothing_seen(FORM),
        FORM,
        True,
    )
    state = (acc * static_scale(v_scales, head, FORM), m, l)
    if places == 1:
        store_result(out, lse, row, q_head, valid, head_dims(PAGES), state, sinks, FORM)
    else:
        at = (row.to(tl.int64) * FORM.q_heads + q_head) * parts + place
        store_part((part_acc, part_m, part_l), at, valid, state, FORM)


@triton.jit(do_not_specialize=STEPWISE)
def reduce(
    sinks,
    out,
    lse,
    part_acc,
    part_m,
    part_l,
    cu_q,
    seq_lens,
    shared_keys,
    window,
    parts,
    FORM: tl.constexpr,
    SHARED: tl.constexpr,
):
    """The parts of one row and query head merged, in an order of its own. Grid: (q_heads, rows, sequences)."""
    COLUMNS: tl.constexpr = FORM.pages.columns
    q_head = tl.program_id(0)
    offset = tl.program_id(1)
    seq = tl.program_id(2)
    first_row = tl.load(cu_q + seq)
    rows = tl.load(cu_q + seq + 1) - first_row
    _, _, before, count = _split(seq, rows, tl.load(seq_lens + seq), shared_keys, window, FORM, SHARED)
    count += before
    if (offset < rows) & (count > 1):
        row = first_row + offset
        place = (row.to(tl.int64) * FORM.q_heads + q_head) * parts
        every = tl.arange(0, 2 * SEGMENTS)  # those of shared keys and its own
        m = tl.max(tl.load(part_m + place + every, mask=every < count, other=NOTHING), 0)
        dims = tl.arange(0, COLUMNS)
        acc = tl.zeros([1, COLUMNS], tl.float32)
        l = tl.zeros([1], tl.float32)
        for start in tl.range(0, count, _CHUNK):
            part = start + tl.arange(0, _CHUNK)
            there = part < count
            weight = tl.exp2(tl.load(part_m + place + part, mask=there, other=NOTHING) - m)
            l += tl.sum(weight * tl.load(part_l + place + part, mask=there, other=0.0), 0)
            address = part_acc + (place + part)[:, None] * FORM.pages.head_dim + dims[None, :]
            inside = there[:, None] & (dims < FORM.pages.head_dim)[None, :]
            acc += tl.sum(weight[:, None] * tl.load(address, mask=inside, other=0.0), 0, keep_dims=True)
        one = tl.zeros([1], tl.int32)
        state = (acc, m + tl.zeros([1], tl.float32), l)
        store_result(out, lse, row + one, q_head + one, one == 0, dims, state, sinks, FORM)
