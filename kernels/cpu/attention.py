"""Paged attention from torch's fused CPU kernel: sequences of like shape in one call, one call per shape.

    prepare, once per step                           run, once per layer
    sequences ─▶ groups by (rows, context) ─▶        gather K, V ─▶ fused kernel ─▶ merge ─▶ rows in order
                 each with one or two sources

A decode (one row) has one source: all its keys. A chunk or a verification has two, merged by lse: its context, where
every row sees the same keys, and its own rows, causal or by tree mask. So the long part needs no mask of rows by keys,
and the heads of a group are rows of one matrix (64 rows on 512 keys, 7 heads per group, bf16, one core: 0.36 ms; a
matrix per head 0.64 ms; from 512 rows on the two are equal).

Lengths are padded up a fixed grid and operands laid out alike for one sequence and for many, so how a sequence is
computed follows from its own lengths, and what it shares the call with does not change a bit of its result. Padding
repeats a slot the sequence owns: stale contents of other slots, NaN too, are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import LayerKV, RaggedBatch
from ..registry import Target, implements

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

KEY_STEP = 16  # keys: the fused kernel's vectors hold 16 fp32
CAPPED_ROWS = 64  # rows whose capped scores are held at once: 64 x 32k keys x 16 heads are 128 MiB

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Source:
    """Keys that n sequences of Q rows read together, L of each.

    mask is added to the scores: [n, 1, 1, L] where all rows of a sequence see the same keys, else [n, 1, Q, L].
    """

    slots: Tensor  # [n * L] int64
    mask: Tensor | None  # fp32, 0 or -inf
    causal: bool = False  # row i sees the keys 0 .. i
    blind: Tensor | None = None  # [n, Q, 1] bool: rows that see none of these keys, where there are any
    by_head: Tensor | None = None  # the [n, 1, Q, L] mask repeated for every KV head, made by the first layer

    @property
    def rows_differ(self) -> bool:
        return self.causal or (self.mask is not None and self.mask.shape[2] > 1)


class Group(NamedTuple):
    rows: slice | Tensor  # n * Q batch rows; short sequences repeat their first
    num_seqs: int  # n
    num_rows: int  # Q
    sources: list[Source]


class GroupedPlan(NamedTuple):
    groups: list[Group]
    order: Tensor | None  # [T]: where each batch row lies in the groups laid end to end; None = in place already
    idle_rows: bool  # some rows read nothing: they lie behind the last group


def prepare_attention(batch: RaggedBatch, block_size: int, window: int | None) -> GroupedPlan:
    """Once per step and window size; see the reference for what the window means."""
    cu_q = batch.cu_q.numpy().astype(np.int64)
    num_rows = np.diff(cu_q)
    ends = batch.seq_lens.numpy().astype(np.int64)
    blocks = batch.block_table.numpy()
    positions = batch.positions.numpy()
    trees = None if batch.tree_mask is None else batch.tree_mask.numpy()

    shapes: dict[tuple[int, int, bool, bool], list[int]] = {}
    for s, (rows, end) in enumerate(zip(num_rows.tolist(), ends.tolist(), strict=True)):
        if rows and end:
            keys = end if rows == 1 else end - rows
            edge = window is not None and rows > 1 and end > window  # rows see the window's edge at different keys
            if window is not None:
                keys = min(keys, window if rows == 1 else window - 1)
            tree = trees is not None and rows > 1 and bool(trees[cu_q[s] : cu_q[s + 1]].any())
            shapes.setdefault((_pad(rows, 1), _pad(keys, KEY_STEP), edge, tree), []).append(s)

    groups, order, laid = [], np.full(batch.num_tokens, -1, dtype=np.int64), 0
    for (width, keys, edge, tree), members in shapes.items():
        seqs = np.array(members)
        first, count, end = cu_q[seqs], num_rows[seqs], ends[seqs]
        column = np.arange(width)
        real = column < count[:, None]
        rows = first[:, None] + np.where(real, column, 0)  # [n, Q]
        order[rows[real]] = laid + np.flatnonzero(real)
        laid += rows.size
        if width == 1:
            low = _window_start(positions[first], window)
            sources = [_span(blocks[seqs], low, end, keys, block_size)]
        else:
            context = end - count
            own_trees = trees[rows] if trees is not None and tree else None
            sources = [_own_rows(blocks[seqs], context, positions[rows], real, own_trees, block_size, window)]
            if keys:
                low = _window_start(context, window)
                sources.append(_span(blocks[seqs], low, context, keys, block_size))
                if window is not None and edge:
                    _narrow(sources[-1], low, context, positions[rows], keys, window)
        groups.append(Group(_as_slice(rows.ravel()), len(seqs), width, sources))

    idle = order < 0
    order[idle] = laid
    in_place = laid == len(order) and bool((order == np.arange(laid)).all())
    return GroupedPlan(groups, None if in_place and groups else torch.from_numpy(order), bool(idle.any()) or not groups)


def _pad(n: int, step: int) -> int:
    """n up to a grid of multiples of step that thins out to four points per octave: at most a quarter is padding."""
    step = max(step, (1 << n.bit_length()) >> 3)
    return -(-n // step) * step


def _as_slice(rows: Ints) -> slice | Tensor:
    start, size = int(rows[0]), len(rows)
    if rows[-1] - start == size - 1 and (np.diff(rows) == 1).all():
        return slice(start, start + size)
    return torch.from_numpy(rows)


def _window_start(row_position: Ints, window: int | None) -> Ints:
    """The first key that the row at this position sees."""
    return np.zeros_like(row_position) if window is None else np.maximum(row_position - window + 1, 0)


def _span(blocks: NDArray[np.int32], low: Ints, high: Ints, width: int, block_size: int) -> Source:
    """The keys low .. high - 1 of each sequence, padded to width."""
    index = low[:, None] + np.arange(width)
    inside = index < high[:, None]
    mask = None
    if not inside.all():
        index = np.where(inside, index, low[:, None])
        mask = _additive(inside[:, None, None])
    return Source(_slots(blocks, index, block_size), mask)


def _own_rows(
    blocks: NDArray[np.int32],
    context: Ints,
    positions: Ints,
    real: NDArray[np.bool_],
    trees: Ints | None,
    block_size: int,
    window: int | None,
) -> Source:
    """The keys of this step's own rows: causal unless a tree or a window narrower than the rows says otherwise."""
    n, width = positions.shape
    column = np.arange(width)
    index = context[:, None] + np.where(real, column, 0)
    slots = _slots(blocks, index, block_size)
    if trees is None and (window is None or width <= window):
        return Source(slots, None, causal=True)
    seen = np.broadcast_to(column <= column[:, None], (n, width, width))
    if trees is not None:
        draft = (trees[..., None] >> np.minimum(column, 63)) & real[:, None] & 1 == 1
        seen = np.where(trees[..., None] == 0, seen, draft)
    if window is not None:
        seen = seen & (positions[..., None] - index[:, None] < window)
    return Source(slots, _additive(seen[:, None]), blind=_blind(seen))


def _narrow(source: Source, low: Ints, high: Ints, positions: Ints, width: int, window: int) -> None:
    """Give a context source a mask per row."""
    index = low[:, None] + np.arange(width)
    seen = (index < high[:, None])[:, None] & (positions[..., None] - index[:, None] < window)
    source.mask, source.blind = _additive(seen[:, None]), _blind(seen)


def _slots(blocks: NDArray[np.int32], index: Ints, block_size: int) -> Tensor:
    block = np.take_along_axis(blocks, index // block_size, axis=1).astype(np.int64)
    return torch.from_numpy((block * block_size + index % block_size).ravel())


def _additive(seen: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf)))


def _blind(seen: NDArray[np.bool_]) -> Tensor | None:
    blind = np.all(~seen, axis=-1, keepdims=True)
    return torch.from_numpy(blind) if blind.any() else None


def _usable(target: Target) -> str | None:
    if target.device != "cpu":
        return f"runs on cpu, the target is {target.device}"
    if target.kv_format not in ("bf16", "fp16", "fp32"):
        return f"reads plain keys and values, the cache holds {target.kv_format}"
    return None


@implements("attention", "cpu", when=_usable, prepare=prepare_attention)
def attention(
    q: Tensor, cache: LayerKV, plan: Any, scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See the reference. Scores and sums are fp32; partial results are rounded to q's dtype before they are merged."""
    num_heads, head_dim = q.shape[1:]
    outputs, lses = [], []
    for group in plan.groups:
        rows = q[group.rows] if isinstance(group.rows, slice) else q.index_select(0, group.rows)
        o, lse = _attend(rows, cache, group, group.sources[0], scale, softcap)
        for source in group.sources[1:]:
            o, lse = _merge(o, lse, *_attend(rows, cache, group, source, scale, softcap))
        outputs.append(o.reshape(-1, num_heads, head_dim).contiguous())
        lses.append(lse.reshape(-1, num_heads))
    if plan.idle_rows:
        outputs.append(q.new_zeros(1, num_heads, head_dim))
        lses.append(torch.full((1, num_heads), float("-inf")))
    o, lse = (outputs[0], lses[0]) if len(outputs) == 1 else (torch.cat(outputs), torch.cat(lses))
    if plan.order is not None:
        o, lse = o.index_select(0, plan.order), lse.index_select(0, plan.order)
    return (o, lse) if sinks is None else _drain(o, lse, sinks)


def _attend(
    rows: Tensor, cache: LayerKV, group: Group, source: Source, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """One source: rows [n * Q, Hq, D] -> o [n, Q, Hk, G, D], lse [n, Q, Hk, G], with G query heads per KV head."""
    n, num_rows, kv_heads, dim = group.num_seqs, group.num_rows, cache.k.shape[2], rows.shape[2]
    keys = cache.k.flatten(0, 1).index_select(0, source.slots).view(n, -1, kv_heads, dim).transpose(1, 2)
    values = cache.v.flatten(0, 1).index_select(0, source.slots).view(n, -1, kv_heads, dim).transpose(1, 2)
    if keys.dtype != rows.dtype:
        keys, values = keys.to(rows.dtype), values.to(rows.dtype)
    q = rows.unflatten(0, (n, num_rows)).unflatten(2, (kv_heads, -1))  # [n, Q, Hk, G, D]
    heads = q.shape[3]
    fused = _capped if softcap else _flash
    if not source.rows_differ:  # heads of a group are rows, Q * G of them
        q = q.transpose(1, 2).reshape(n, kv_heads, num_rows * heads, dim).contiguous()
        o, lse = fused(q, keys, values, source.mask, False, scale, softcap)
        o, lse = o.unflatten(2, (num_rows, heads)).transpose(1, 2), lse.unflatten(2, (num_rows, heads)).transpose(1, 2)
    else:  # one matrix of Q rows per head; a group reads the same keys
        mask = source.mask
        if mask is not None and n > 1:
            if source.by_head is None:
                source.by_head = mask.repeat_interleave(kv_heads, dim=0)
            mask = source.by_head
        q = q.permute(0, 2, 3, 1, 4).reshape(n * kv_heads, heads, num_rows, dim).contiguous()
        keys, values = (x.contiguous().view(n * kv_heads, 1, -1, dim).expand(-1, heads, -1, -1) for x in (keys, values))
        o, lse = fused(q, keys, values, mask, source.causal, scale, softcap)
        o = o.unflatten(0, (n, kv_heads)).permute(0, 3, 1, 2, 4)
        lse = lse.unflatten(0, (n, kv_heads)).permute(0, 3, 1, 2)
    if source.blind is not None:  # the fused kernel gives such rows 0 for an lse
        lse = lse.masked_fill(source.blind[..., None], float("-inf"))
    return o, lse


def _flash(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    return _fused(q, keys, values, 0.0, causal, attn_mask=mask, scale=scale)


def _capped(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The same with scores softcap · tanh(score / softcap), which the fused kernel lacks; fp32, tiles of rows."""
    keys, values = keys.float().transpose(-1, -2), values.float()
    if causal:
        mask = torch.full((q.shape[2], keys.shape[-1]), float("-inf")).triu(1)[None, None]
    outputs, lses = [], []
    for start in range(0, q.shape[2], CAPPED_ROWS):
        tile = slice(start, start + CAPPED_ROWS)
        scores = (q[:, :, tile].float() @ keys).mul_(scale / softcap).tanh_().mul_(softcap)
        if mask is not None:
            scores += mask if mask.shape[2] == 1 else mask[:, :, tile]
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp_()
        outputs.append((weights @ values).to(q.dtype))
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """merge_states of two."""
    share_a, share_b, lse = _shares(lse_a.contiguous(), lse_b.contiguous())
    merged = (o_a * share_a[..., None]).add_(o_b * share_b[..., None])  # fp32, as the shares are
    return merged.to(o_a.dtype), lse


def _drain(o: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add a sink per head to the denominators."""
    share, _, total = _shares(lse, sinks.float())
    return (o * share[..., None]).to(o.dtype), total


def _shares(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(a) and exp(b) as parts of their sum, and its log; two -inf have no part and give -inf.

    Written out, because torch's sigmoid, logaddexp and lerp round by where an element lies in a vector register.
    """
    top = torch.maximum(lse_a, lse_b).clamp_min_(torch.finfo(torch.float32).min)
    a, b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = a + b
    log_total = total.log().add_(top)
    total.clamp_min_(1.0)  # it is 1 to 2, or 0 where nothing was seen
    return a.div_(total), b.div_(total), log_total
