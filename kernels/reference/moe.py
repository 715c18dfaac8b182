"""A mixture of gated feed-forward experts, after routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import op
from .activation import gelu_and_mul, silu_and_mul

GATES = {"silu": silu_and_mul, "gelu": gelu_and_mul}


class PackedExperts(NamedTuple):
    gate_up: Tensor  # [E, 2f, d]
    down: Tensor  # [E, d, f]


def prepare_moe(gate_up: Tensor, down: Tensor) -> PackedExperts:
    """Once per layer: gate_up [E, 2f, d] with the gate in the first f rows, down [E, d, f]."""
    return PackedExperts(gate_up, down)


@op(prepare=prepare_moe)
def moe(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """out[t] = Σ_j topk_weights[t, j] · expert[topk_ids[t, j]](x[t]), summed in fp32.

    x [T, d], topk_weights [T, k], topk_ids [T, k] in 0 .. E-1 and distinct within a row,
    activation "silu" or "gelu" -> [T, d] in x's dtype.
    """
    return gated_experts(
        x,
        topk_weights,
        topk_ids,
        activation,
        lambda h, e: h.to(x.dtype) @ packed.gate_up[e].T,
        lambda h, e: h.to(x.dtype) @ packed.down[e].T,
    )


def gated_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    gate_up: Callable[[Tensor, int], Tensor],
    down: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """The mixture, given the two products of an expert: (rows [t, d] or [t, f] fp32, expert) -> [t, 2f] or [t, d]."""
    gate = GATES[activation]
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        rows, choice = (topk_ids == expert).nonzero(as_tuple=True)
        hidden = gate(gate_up(x[rows].float(), expert)).float()
        share = topk_weights[rows, choice, None].float()
        out[rows] += share * down(hidden, expert).float()
    return out.to(x.dtype)
