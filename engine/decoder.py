"""One decoder for every model family: what differs is chosen when it is built, and running it is a straight line.

    x = first norm(embedding)                     residual = embedding
    for block, join in blocks:                    block: attention, feed-forward, or mixture of experts
        x, residual = join(block(x), residual)    join: residual += delta, and the norm before the next block
    hidden = x                                    the last join holds the final norm

Post-norms (Gemma, OLMo 2) are part of a join too, so the families share this loop (see `Join`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.batch import LayerKV, RaggedBatch
from ..kernels.packed import RowFormat
from .linear import Experts, Linear, Rows
from .model_config import DecoderConfig

QkNormed = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # q [T, Hq, D] and k [T, Hk, D], each normed
Join = Callable[[Tensor, Tensor], tuple[Rows, Tensor]]  # (delta, residual) [T, d] -> (the next block's x, residual)


class Block(Protocol):
    """x [T, d] -> what it adds to the residual [T, d]. rows: as it wants x, for the norm before it; None = plain."""

    rows: RowFormat | None

    def __call__(self, x: Any, step: Step) -> Tensor: ...


@dataclass(slots=True)
class Step:
    """What all layers share in one forward pass."""

    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T]
    cache: Sequence[LayerKV]  # per layer
    plans: list[Any]  # per distinct window: the prepared attention plan


class Attention:
    """Joined qkv projection, q and k norms, rotation, paged attention, output projection: [T, d] -> [T, d]."""

    def __init__(
        self,
        config: DecoderConfig,
        kernels: Kernels,
        layer: int,
        plan: int,
        qkv: Linear,
        o: Linear,
        rope_table: Tensor | None,
        norm_qk: QkNormed | None,
        turn_values: bool = False,
    ) -> None:
        """plan: index into Step.plans; rope_table: None = a layer without positions; turn_values: the cache holds
        values times the Hadamard matrix, and the weights of v and o do not have it in them."""
        self.layer, self.plan = layer, plan
        self.qkv, self.o, self.rows, self.rope_table = qkv, o, qkv.rows, rope_table
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.shape = (-1, sum(self.heads), config.head_dim)
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.norm_qk = norm_qk
        self.turn = kernels.hadamard.run if turn_values else None
        self.kv_write, self.rope_kv_write = kernels.kv_write.run, kernels.rope_kv_write.run
        self.attention = kernels.attention.run

    def __call__(self, x: Rows, step: Step) -> Tensor:
        q, k, v = torch.split_with_sizes(self.qkv(x).view(self.shape), self.heads, 1)
        if self.norm_qk is not None:
            q, k = self.norm_qk(q, k)
        if self.turn is not None:
            v = self.turn(v)
        cache = step.cache[self.layer]
        if self.rope_table is None:
            self.kv_write(k, v, cache, step.slot_mapping)
        else:
            q = self.rope_kv_write(q, k, v, step.positions, self.rope_table, False, cache, step.slot_mapping)
        out, _ = self.attention(q, cache, step.plans[self.plan], self.scale, self.softcap, None)
        if self.turn is not None:
            out = self.turn(out)
        return self.o(out.flatten(1))


def make_qk_norm(config: DecoderConfig, kernels: Kernels, q_weight: Tensor, k_weight: Tensor) -> QkNormed:
    """By weights of one head, or of all heads of a row."""
    norm, eps, offset = kernels.rms_norm.run, config.eps, config.norm_offset

    def per_head(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return norm(q, q_weight, eps, offset), norm(k, k_weight, eps, offset)

    def whole_row(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (
            norm(q.flatten(1), q_weight, eps, offset).view(q.shape),
            norm(k.flatten(1), k_weight, eps, offset).view(k.shape),
        )

    return per_head if config.qk_norm == "head" else whole_row


class FeedForward:
    """down(activation(gate(x)) * up(x)), gate and up joined: [T, d] -> [T, d]."""

    def __init__(self, config: DecoderConfig, kernels: Kernels, gate_up: Linear, down: Linear) -> None:
        self.gate_up, self.down, self.rows = gate_up, down, gate_up.rows
        self.activate = _activation(config, kernels, down.rows)

    def __call__(self, x: Rows, step: Step) -> Tensor:
        return self.down(self.activate(self.gate_up(x)))


def _activation(config: DecoderConfig, kernels: Kernels, rows: RowFormat | None) -> Callable[[Tensor], Rows]:
    silu = config.activation == "silu"
    if rows is None:
        return (kernels.silu_and_mul if silu else kernels.gelu_and_mul).run
    run = (kernels.silu_and_mul_rows if silu else kernels.gelu_and_mul_rows).run
    return lambda x: run(x, rows)


class MixtureOfExperts:
    """The experts that a router chooses for each token, weighed by their probability, and one that all tokens pass."""

    rows: RowFormat | None = None  # the router wants plain activations; the experts quantize the rows they gather

    def __init__(
        self,
        config: DecoderConfig,
        kernels: Kernels,
        router: Linear,
        experts: Experts,
        shared: tuple[FeedForward, Linear] | None,
    ) -> None:
        """router: [E, d]; shared: the feed-forward that every token passes, and its gate [1, d]."""
        moe = config.moe
        if moe is None:
            raise ValueError("the configuration has no mixture of experts")
        self.router, self.experts, self.shared = router, experts, shared
        self.top_k, self.renormalize, self.activation = moe.top_k, moe.renormalize, config.activation
        self.route, self.add_gated = kernels.route.run, kernels.add_gated.run

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        weights, ids = self.route(self.router(x), self.top_k, self.renormalize)
        out = self.experts.run(x, self.experts.packed, weights, ids, self.activation)
        if self.shared is not None:
            expert, gate = self.shared
            out = self.add_gated(out, gate(x), expert(x, step))
        return out


def make_norm(
    config: DecoderConfig, kernels: Kernels, weight: Tensor, rows: RowFormat | None
) -> Callable[[Tensor], Rows]:
    """x [T, d] -> its norm by weight [d], quantized where the next block wants rows."""
    eps, offset = config.eps, config.norm_offset
    if rows is None:
        norm = kernels.rms_norm.run
        return lambda x: norm(x, weight, eps, offset)
    norm_rows = kernels.rms_norm_rows.run
    return lambda x: norm_rows(x, weight, eps, offset, rows)


def make_join(
    config: DecoderConfig, kernels: Kernels, leave: Tensor | None, enter: Tensor | None, rows: RowFormat | None
) -> Join:
    """The join between two blocks: norm the delta by `leave`, add it to the residual, norm the sum by `enter`.

    Either weight [d] may be None. Llama has only `enter`, OLMo 2 only `leave` (but for the final norm), Gemma both.
    rows: as the next block wants the norm.
    """
    norm, add, eps, offset = kernels.rms_norm.run, kernels.add_residual.run, config.eps, config.norm_offset

    def post(delta: Tensor, residual: Tensor) -> tuple[Rows, Tensor]:
        total = add(norm(delta, leave, eps, offset), residual)
        return total, total

    if enter is None:
        return post
    pre = _add_norm(config, kernels, enter, rows)
    if leave is None:
        return pre
    return lambda delta, residual: pre(norm(delta, leave, eps, offset), residual)


def _add_norm(config: DecoderConfig, kernels: Kernels, weight: Tensor, rows: RowFormat | None) -> Join:
    eps, offset = config.eps, config.norm_offset
    if rows is None:
        add_norm = kernels.add_rms_norm.run
        return lambda delta, residual: add_norm(delta, residual, weight, eps, offset)
    add_norm_rows = kernels.add_rms_norm_rows.run
    return lambda delta, residual: add_norm_rows(delta, residual, weight, eps, offset, rows)


class Decoder:
    """The whole model. Stateless: everything that a request is lies in the batch and the cache."""

    def __init__(
        self,
        config: DecoderConfig,
        kernels: Kernels,
        embedding: Tensor,
        embed: Callable[[Tensor, Tensor, float], Tensor],
        first_norm: Callable[[Tensor], Rows] | None,
        blocks: list[tuple[Block, Join]],
        lm_head: Linear,
        windows: tuple[int | None, ...],
    ) -> None:
        """embedding, lm_head [V, d]; embed: the op `embed`; first_norm: what stands before the first block; windows:
        the distinct ones. Of several ranks each has some rows of the [V, d], and `embed` and `lm_head` give all."""
        self.config = config
        self.embedding, self.first_norm, self.blocks, self.lm_head = embedding, first_norm, blocks, lm_head
        self.windows = windows
        # Rounded as the weights are: Gemma was trained with sqrt(hidden) in the checkpoint's precision.
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=embedding.dtype).item()
        self.embed, self.take_rows, self.soft_cap = embed, kernels.take_rows.run, kernels.soft_cap.run
        self.prepare_attention = kernels.attention.prepare

    def forward(self, batch: RaggedBatch, cache: Sequence[LayerKV]) -> Tensor:
        """Hidden rows [T, d] after the final norm; this step's keys and values go into the cache (one per layer)."""
        return self.run(batch.input_ids, self.step(batch, cache))

    def step(self, batch: RaggedBatch, cache: Sequence[LayerKV]) -> Step:
        """What all layers share."""
        block_size = cache[0].spec.block_size
        plans = [self.prepare_attention(batch, block_size, window) for window in self.windows]
        return Step(batch.positions, batch.slot_mapping, cache, plans)

    def run(self, input_ids: Tensor, step: Step) -> Tensor:
        """The layers, of token ids [T]: hidden rows [T, d]."""
        x, residual = self.enter(input_ids)
        for block, join in self.blocks:
            x, residual = join(block(x, step), residual)
        return x

    def enter(self, input_ids: Tensor) -> tuple[Rows, Tensor]:
        """What the first block is given: x and the residual [T, d]."""
        residual = self.embed(input_ids, self.embedding, self.embedding_scale)
        return residual if self.first_norm is None else self.first_norm(residual), residual

    def logits_at(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """`logits` of the hidden rows of these numbers [L] int64."""
        return self.logits(self.take_rows(hidden, rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden rows [L, d]: [L, V] fp32, soft-capped where the model is."""
        logits = self.lm_head(hidden)
        cap = self.config.logit_softcap
        return logits if cap == 0 else self.soft_cap(logits, cap)
