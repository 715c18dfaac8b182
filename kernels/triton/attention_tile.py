"""The body that all attention kernels share: rows of queries go over a range of keys, tile by tile, in base 2.

State of a row: m, an integer; l = Σ 2^(s - m); acc = Σ 2^(s - m) · v over the keys seen so far, s = score · log2 e.
m is the largest score rounded up (the exponent of Two-Pass softmax, arXiv 2001.04438): what is rescaled is rescaled by
powers of two, so without an error, and mostly by 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .kv_pages import Pages, head_dims, load_scales, load_tile, slots_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# m of a row that has seen nothing: below every score, and finite, so that no -inf - -inf arises.
NOTHING = tl.constexpr(-1e30)
# Arguments that change from step to step. Compiled anew for 1 and for multiples of 16, as the JIT does with numbers,
# a kernel would stop the engine for seconds.
STEPWISE = ("table_stride", "window", "parts", "tiles", "short_seqs", "num_seqs", "num_groups")


@dataclass(frozen=True, slots=True)
class Form:
    """What the compiler knows of an attention layer and a step."""

    pages: Pages
    q_heads: int
    block_m: int  # queries of a tile
    block_n: int  # keys of a tile
    dtype: tl.dtype  # of the matrix products' operands
    softcap: bool
    sinks: bool
    tree: bool
    window: bool

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_heads // self.pages.kv_heads


@triton.jit
def attend(
    q,
    head,
    rows_see,
    context,
    first,
    end,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    table,
    factor,
    softcap,
    state,
    FORM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state after the keys first .. end - 1 of one sequence and KV head; no other key is read.

    q [M, columns]; rows_see = (last key, first key of the window, tree mask), [M] each; context: the key of the
    sequence's first row; table: its row of the block table; state = (acc [M, columns], m [M], l [M]).
    factor > 0: from q · k to a score in base 2 or, under a softcap, to the score over the softcap; softcap: in base 2.
    MASKED: False where every row sees every key and the range is whole tiles.
    """
    PAGES: tl.constexpr = FORM.pages
    DTYPE: tl.constexpr = FORM.dtype
    acc, m, l = state
    k_pages += head * PAGES.width
    v_pages += head * PAGES.width
    if PAGES.token_scales:
        # Scales are too narrow for the asynchronous copies of the pages, so they are loaded one tile ahead, and the
        # slots that this takes two tiles.
        k_scales += head
        v_scales += head
        keys = first + tl.arange(0, FORM.block_n)
        k_scale, v_scale = _scales_at(k_scales, v_scales, table, keys, end, PAGES)
        ahead = slots_of(table, keys + FORM.block_n, keys + FORM.block_n < end, PAGES, True)
    for start in tl.range(first, end, FORM.block_n):
        keys = start + tl.arange(0, FORM.block_n)
        there = keys < end
        if PAGES.token_scales:
            k_next = load_scales(k_scales, ahead, keys + FORM.block_n < end, PAGES)
            v_next = load_scales(v_scales, ahead, keys + FORM.block_n < end, PAGES)
            ahead = slots_of(table, keys + 2 * FORM.block_n, keys + 2 * FORM.block_n < end, PAGES, True)
        slots = slots_of(table, keys, there, PAGES, MASKED)
        k = load_tile(k_pages, slots, there, PAGES, DTYPE, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if PAGES.token_scales:
            s *= k_scale[None, :]
        s *= factor
        if FORM.softcap:
            s = softcap * _tanh(s)
        if MASKED:
            s = tl.where(_visible(keys, rows_see, context, FORM) & there[None, :], s, float("-inf"))
        risen = tl.maximum(m, tl.ceil(tl.max(s, 1)))
        p = tl.exp2(s - risen[:, None])
        rescale = tl.exp2(m - risen)
        l = l * rescale + tl.sum(p, 1)
        if PAGES.token_scales:  # before the weights are rounded
            p *= v_scale[None, :]
            k_scale = k_next
            v_scale = v_next
        v = load_tile(v_pages, slots, there, PAGES, DTYPE, MASKED)
        acc = tl.dot(p.to(DTYPE), v, acc * rescale[:, None], input_precision="ieee")
        m = risen
    return acc, m, l


@triton.jit
def _scales_at(k_scales, v_scales, table, keys, end, PAGES: tl.constexpr):
    slots = slots_of(table, keys, keys < end, PAGES, True)
    return load_scales(k_scales, slots, keys < end, PAGES), load_scales(v_scales, slots, keys < end, PAGES)


@triton.jit
def _visible(keys, rows_see, context, FORM: tl.constexpr):
    """Which of the keys [N] the rows see: [M, N], by the rule of batch.py."""
    last, first, tree = rows_see
    seen = keys[None, :] <= last[:, None]
    if FORM.tree:
        draft = keys - context
        bit = (tree[:, None] >> tl.minimum(tl.maximum(draft, 0), 63).to(tl.int64)[None, :]) & 1
        seen = tl.where((tree == 0)[:, None], seen, (draft < 0)[None, :] | (bit != 0))
    if FORM.window:
        seen = seen & (keys[None, :] >= first[:, None])
    return seen


@triton.jit
def _tanh(x):
    """By exp2, since there is no tanh that both the compiler and the interpreter have; ±1 at the infinities."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2 * LOG2_E)))


@triton.jit
def nothing_seen(FORM: tl.constexpr):
    """The state before the first key."""
    M: tl.constexpr = FORM.block_m
    COLUMNS: tl.constexpr = FORM.pages.columns
    return tl.zeros([M, COLUMNS], tl.float32), tl.full([M], NOTHING, tl.float32), tl.zeros([M], tl.float32)


@triton.jit
def load_queries(q, row, q_head, valid, row_stride, head_stride, FORM: tl.constexpr):
    """Queries at (row, head) pairs [M]: [M, columns], zeros where there is none."""
    PAGES: tl.constexpr = FORM.pages
    dims = head_dims(PAGES)
    address = q + row.to(tl.int64)[:, None] * row_stride + q_head[:, None] * head_stride + dims[None, :]
    inside = valid[:, None] & (dims < FORM.pages.head_dim)[None, :]
    return tl.load(address, mask=inside, other=0.0).to(FORM.dtype)


@triton.jit
def static_scale(scales, head, FORM: tl.constexpr):
    """The head's scale where all its keys (or values) have one, else 1."""
    if FORM.pages.static_scales:
        return tl.load(scales + head).to(tl.float32)
    else:
        return 1.0


@triton.jit
def store_part(part, place, valid, state, FORM: tl.constexpr):
    """The state at places [M] of part = (acc [.., head_dim], m [..], l [..])."""
    PAGES: tl.constexpr = FORM.pages
    acc, m, l = state
    part_acc, part_m, part_l = part
    dims = head_dims(PAGES)
    inside = valid[:, None] & (dims < FORM.pages.head_dim)[None, :]
    tl.store(part_acc + place[:, None] * FORM.pages.head_dim + dims[None, :], acc, mask=inside)
    tl.store(part_m + place, m, mask=valid)
    tl.store(part_l + place, l, mask=valid)


@triton.jit
def store_result(out, lse, row, q_head, valid, dims, state, sinks, FORM: tl.constexpr):
    """The state as out [T, q_heads, head_dim] and lse [T, q_heads] (natural), the sink in the denominator.

    row, q_head, valid [M]; dims [columns]: the entry of the head in each column of acc.
    """
    acc, m, l = state
    if FORM.sinks:
        sink = tl.load(sinks + q_head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        risen = tl.maximum(m, tl.ceil(sink))
        rescale = tl.exp2(m - risen)
        acc *= rescale[:, None]
        l = l * rescale + tl.exp2(sink - risen)
        m = risen
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    place = row.to(tl.int64) * FORM.q_heads + q_head
    inside = valid[:, None] & (dims < FORM.pages.head_dim)[None, :]
    address = out + place[:, None] * FORM.pages.head_dim + dims[None, :]
    tl.store(address, (acc / l[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + place, tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN_2), mask=valid)
