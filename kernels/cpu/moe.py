"""A mixture of experts: tokens sorted by expert, one product per expert that has any."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import implements
from .activation import gelu_and_mul, silu_and_mul
from .linear import PackedLinear, linear, prepare_linear, usable

GATES = {"silu": silu_and_mul, "gelu": gelu_and_mul}


class PackedExperts(NamedTuple):
    gate_up: list[PackedLinear]
    down: list[PackedLinear]


def prepare_moe(gate_up: Tensor, down: Tensor) -> PackedExperts:
    """Once per layer: gate_up [E, 2f, d] with the gate in the first f rows, down [E, d, f]."""
    return PackedExperts([prepare_linear(w, None) for w in gate_up], [prepare_linear(w, None) for w in down])


@implements("moe", "cpu", when=usable, prepare=prepare_moe)
def moe(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference."""
    num_tokens, k = topk_ids.shape
    gate = GATES[activation]
    experts, order = topk_ids.flatten().sort(stable=True)
    rows = x.index_select(0, order // k)
    counts = experts.bincount(minlength=len(packed.down)).tolist()
    routed = torch.empty(num_tokens * k, x.shape[1], dtype=x.dtype)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            chosen = slice(start, start + count)
            routed[chosen] = linear(gate(linear(rows[chosen], packed.gate_up[expert])), packed.down[expert])
            start += count
    share = topk_weights.flatten().index_select(0, order).float()[:, None]
    weighted = torch.empty_like(routed, dtype=torch.float32).index_copy_(0, order, routed * share)
    return weighted.unflatten(0, (num_tokens, k)).sum(1).to(x.dtype)
