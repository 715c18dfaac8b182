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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import Kernels
from ..kernels.batch import LayerKV, RaggedBatch
from .model_config import DecoderConfig

Block = Callable[[Tensor, "Step"], Tensor]
Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (delta, residual) [T, d] -> (the next block's x, residual)


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
        qkv: Any,
        o: Any,
        rope_table: Tensor | None,
        qk_norms: tuple[Tensor, Tensor] | None,
    ) -> None:
        """plan: index into Step.plans; qkv, o: prepared linears; rope_table: None = a layer without positions."""
        self.layer, self.plan = layer, plan
        self.qkv, self.o, self.rope_table = qkv, o, rope_table
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.norm_qk = _qk_norm(config, kernels, qk_norms)
        self.linear, self.rope = kernels.linear.run, kernels.rope.run
        self.kv_write, self.attention = kernels.kv_write.run, kernels.attention.run

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        rows = x.shape[0]
        qkv = self.linear(x, self.qkv).view(rows, -1, self.head_dim)
        q, k, v = torch.split_with_sizes(qkv, self.heads, 1)
        if self.norm_qk is not None:
            q, k = self.norm_qk(q, k)
        if self.rope_table is not None:
            q, k = self.rope(q, k, step.positions, self.rope_table, False)
        cache = step.cache[self.layer]
        self.kv_write(k, v, cache, step.slot_mapping)
        out, _ = self.attention(q, cache, step.plans[self.plan], self.scale, self.softcap, None)
        return self.linear(out.reshape(rows, -1), self.o)


def _qk_norm(
    config: DecoderConfig, kernels: Kernels, weights: tuple[Tensor, Tensor] | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    if weights is None:
        return None
    norm, eps, offset = kernels.rms_norm.run, config.eps, config.norm_offset
    q_weight, k_weight = weights

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

    def __init__(self, config: DecoderConfig, kernels: Kernels, gate_up: Any, down: Any) -> None:
        self.gate_up, self.down = gate_up, down
        self.linear = kernels.linear.run
        self.activate = (kernels.silu_and_mul if config.activation == "silu" else kernels.gelu_and_mul).run

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.linear(self.activate(self.linear(x, self.gate_up)), self.down)


class MixtureOfExperts:
    """The top_k most probable experts of each token, weighed by their probability (Shazeer et al. 2017, section 2).

    The softmax runs over all experts in fp32; `renormalize` then scales the chosen ones to sum to 1.
    """

    def __init__(
        self,
        config: DecoderConfig,
        kernels: Kernels,
        router: Any,
        experts: Any,
        shared: tuple[FeedForward, Any] | None,
    ) -> None:
        """router: prepared linear [E, d]; experts: prepared moe; shared: its feed-forward and prepared gate [1, d]."""
        moe = config.moe
        if moe is None:
            raise ValueError("the configuration has no mixture of experts")
        self.router, self.experts, self.shared = router, experts, shared
        self.top_k, self.renormalize, self.activation = moe.top_k, moe.renormalize, config.activation
        self.linear, self.moe = kernels.linear.run, kernels.moe.run

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        probabilities = torch.softmax(self.linear(x, self.router), dim=-1, dtype=torch.float32)
        weights, ids = torch.topk(probabilities, self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = self.moe(x, self.experts, weights, ids, self.activation)
        if self.shared is not None:
            expert, gate = self.shared
            out = out + torch.sigmoid(self.linear(x, gate)) * expert(x, step)
        return out


def make_join(config: DecoderConfig, kernels: Kernels, leave: Tensor | None, enter: Tensor | None) -> Join:
    """The join between two blocks: norm the delta by `leave`, add it to the residual, norm the sum by `enter`.

    Either weight [d] may be None. Llama has only `enter`, OLMo 2 only `leave` (but for the final norm), Gemma both.
    """
    norm, add_norm = kernels.rms_norm.run, kernels.add_rms_norm.run
    eps, offset = config.eps, config.norm_offset

    def pre(delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(delta, residual, enter, eps, offset)

    def post(delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + norm(delta, leave, eps, offset)
        return total, total

    def both(delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(norm(delta, leave, eps, offset), residual, enter, eps, offset)

    if enter is None:
        return post
    return pre if leave is None else both


class Decoder:
    """The whole model. Stateless: everything that a request is lies in the batch and the cache."""

    def __init__(
        self,
        config: DecoderConfig,
        kernels: Kernels,
        embedding: Tensor,
        first_norm: Tensor | None,
        blocks: list[tuple[Block, Join]],
        lm_head: Any,
        windows: tuple[int | None, ...],
    ) -> None:
        """embedding [V, d]; first_norm [d] or None; lm_head: prepared linear [V, d]; windows: the distinct ones."""
        self.config = config
        self.embedding, self.first_norm, self.blocks, self.lm_head = embedding, first_norm, blocks, lm_head
        self.windows = windows
        # Rounded as the weights are: Gemma was trained with sqrt(hidden) in the checkpoint's precision.
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=embedding.dtype).item()
        self.linear, self.norm = kernels.linear.run, kernels.rms_norm.run
        self.prepare_attention = kernels.attention.prepare

    def forward(self, batch: RaggedBatch, cache: Sequence[LayerKV]) -> Tensor:
        """Hidden rows [T, d] after the final norm; this step's keys and values go into the cache (one per layer)."""
        block_size = cache[0].spec.block_size
        plans = [self.prepare_attention(batch, block_size, window) for window in self.windows]
        step = Step(batch.positions, batch.slot_mapping, cache, plans)
        x = residual = self._embed(batch.input_ids)
        if self.first_norm is not None:
            x = self.norm(residual, self.first_norm, self.config.eps, self.config.norm_offset)
        for block, join in self.blocks:
            x, residual = join(block(x, step), residual)
        return x

    def _embed(self, input_ids: Tensor) -> Tensor:
        rows = F.embedding(input_ids, self.embedding)
        return rows if self.embedding_scale == 1.0 else rows * self.embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden rows [L, d]: [L, V] fp32, soft-capped where the model is."""
        logits = self.linear(hidden, self.lm_head).float()
        cap = self.config.logit_softcap
        return logits if cap == 0 else torch.tanh(logits / cap) * cap
