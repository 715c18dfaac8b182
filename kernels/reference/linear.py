"""Matrix product with a weight that stays."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..registry import op


class PackedLinear(NamedTuple):
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]


def prepare_linear(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Once per weight: weight [N, K], bias [N] or None. The caller drops its own reference to the weight."""
    return PackedLinear(weight, bias)


@op(prepare=prepare_linear)
def linear(x: Tensor, packed: Any) -> Tensor:
    """x · weightᵀ + bias: x [T, K] -> [T, N] in x's dtype, accumulated in fp32."""
    return F.linear(x, packed.weight, packed.bias)


@op(prepare=prepare_linear)
def logits(x: Tensor, packed: Any) -> Tensor:
    """x · weightᵀ + bias in fp32 and not rounded after: x [L, d], weight [V, d] -> [L, V] fp32."""
    out = x.float() @ packed.weight.float().T
    return out if packed.bias is None else out + packed.bias.float()
