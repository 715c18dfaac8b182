"""RMS normalisation (Zhang and Sennrich 2019, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import op


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight + offset), in fp32, rounded once at the end.

    x [..., d], weight [d] -> [..., d] in x's dtype. offset is 1 for checkpoints that store weight - 1 (Gemma), else 0.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.float() + offset)).to(x.dtype)


@op
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The residual sum and its norm: (rms_norm(s), s) with s = x + residual rounded to x's dtype.

    x, residual [T, d]; may overwrite both arguments.
    """
    total = x + residual
    return rms_norm(total, weight, eps, offset), total
