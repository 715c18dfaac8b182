"""Attention over paged keys and values, and the merging of partial results. batch.py has the rule of visibility."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import LayerKV, RaggedBatch
from ..registry import op
from .hadamard import hadamard


class AttentionPlan(NamedTuple):
    batch: RaggedBatch
    block_size: int
    window: int | None


def prepare_attention(batch: RaggedBatch, block_size: int, window: int | None) -> AttentionPlan:
    """Once per step and window size; the plan serves every layer with that window.

    window: None, or w >= 1: a key at index p is visible iff positions[row] - p < w, besides the rule of the batch.
    """
    return AttentionPlan(batch, block_size, window)


@op(prepare=prepare_attention)
def attention(
    q: Tensor, cache: LayerKV, plan: Any, scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(score(q · k) over the visible keys) · v for every row of the batch, in fp32.

    q [T, Hq, D] with Hq a multiple of the cache's heads (grouped queries: head h reads KV head h // (Hq / Hk));
    this step's keys and values are in the cache already, in any format of kv_formats.py.
    score(s) = scale · s, then softcap · tanh(· / softcap) unless softcap is 0 (Gemma 2). sinks: None or [Hq], a logit
    per head that only the denominator sees (gpt-oss).

    -> o [T, Hq, D] in q's dtype, lse [T, Hq] fp32 = log of the denominator, the sink included: of the sources that
    are to be merged, one is given the sinks. A row that sees nothing has o = 0 and lse = -inf (or the sink).
    """
    batch = plan.batch
    turned = hadamard(q.float()) if cache.spec.coding.rotates_keys else q.float()
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    if sinks is not None:
        lse[:] = sinks.float()
    cu_q, seq_lens = batch.cu_q.tolist(), batch.seq_lens.tolist()
    for s, seq_len in enumerate(seq_lens):
        rows = slice(cu_q[s], cu_q[s + 1])
        num_rows = rows.stop - rows.start
        if num_rows == 0 or seq_len == 0:
            continue
        context = seq_len - num_rows
        # Keys that no row can see are not even read: their blocks may be recycled.
        first = 0 if plan.window is None else max(0, context - plan.window + 1)
        key_index = torch.arange(first, seq_len, device=q.device)
        blocks = batch.block_table[s].long()[key_index // plan.block_size]
        keys = _gather(cache.k, cache.k_scale, cache, blocks, key_index % plan.block_size)  # [n, Hk, D]
        values = _gather(cache.v, cache.v_scale, cache, blocks, key_index % plan.block_size)
        visible = _visible(batch, rows, context, key_index, plan.window)  # [q, n]
        out[rows], lse[rows] = _dense(turned[rows], keys, values, visible, scale, softcap, sinks)
    return out, lse


def _gather(pages: Tensor, scale: Tensor | None, cache: LayerKV, blocks: Tensor, offsets: Tensor) -> Tensor:
    """Decoded keys or values at (block, offset) pairs [n]: [n, Hk, D] fp32."""
    coding = cache.spec.coding
    if coding.scale == "token" and scale is not None:
        scale = scale[blocks, offsets]
    return coding.decode(pages[blocks, offsets], scale)


def _visible(batch: RaggedBatch, rows: slice, context: int, key_index: Tensor, window: int | None) -> Tensor:
    offset = torch.arange(rows.stop - rows.start, device=key_index.device)[:, None]
    row_of_key = key_index - context  # negative in the context
    seen = row_of_key <= offset
    if batch.tree_mask is not None:
        mask = batch.tree_mask[rows, None]
        in_tree = (row_of_key < 0) | ((mask >> row_of_key.clamp(0, 63)) & 1).bool()
        seen = torch.where(mask == 0, seen, in_tree)
    if window is not None:
        seen = seen & (batch.positions[rows, None] - key_index < window)
    return seen


def _dense(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One sequence: q [r, Hq, D], keys and values [n, Hk, D], visible [r, n] -> o [r, Hq, D], lse [r, Hq]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("rhd,nhd->hrn", q, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)  # [Hq, r]
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float()[:, None])
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(torch.float32).min)[..., None])
    return torch.einsum("hrn,nhd->rhd", weights, values), lse.T


@op
def merge_states(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint sets of keys, from the results over each set.

    outputs: [T, H, D] each, lses: [T, H] fp32 each -> o [T, H, D] fp32, lse [T, H] fp32:
    lse = log Σ exp(lse_i), o = Σ exp(lse_i - lse) · o_i. Where every lse is -inf, o = 0.
    """
    all_lse = torch.stack([x.float() for x in lses])
    lse = all_lse.logsumexp(0)
    weights = torch.exp(all_lse - lse.clamp_min(torch.finfo(torch.float32).min))
    return (weights[..., None] * torch.stack([x.float() for x in outputs])).sum(0), lse
