"""Gated activations: the first half of the columns is the gate, the second half what it lets through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import op


@op
def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up, in fp32. x [T, 2f] -> [T, f]; may overwrite x. SwiGLU (Shazeer 2020, equation 6)."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


@op
def gelu_and_mul(x: Tensor) -> Tensor:
    """gelu(gate) · up with the tanh approximation, in fp32. x [T, 2f] -> [T, f]; may overwrite x. GEGLU (ibid.)."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


@op
def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): what is within cap is hardly changed, nothing is beyond (Gemma 2, section 2).

    x [L, V] fp32 -> [L, V]; may overwrite x.
    """
    return torch.tanh(x / cap) * cap
