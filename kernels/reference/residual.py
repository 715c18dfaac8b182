"""Sums of what blocks and experts give."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import op


@op
def add_residual(x: Tensor, residual: Tensor) -> Tensor:
    """x + residual, rounded to their dtype. x, residual [T, d] -> [T, d]; may overwrite x."""
    return x + residual


@op
def add_gated(out: Tensor, gate: Tensor, expert: Tensor) -> Tensor:
    """out + sigmoid(gate) · expert in fp32, rounded once to their dtype: the expert that every token passes.

    out, expert [T, d], gate [T, 1] -> [T, d]; may overwrite out.
    """
    return (out.float() + torch.sigmoid(gate.float()) * expert.float()).to(out.dtype)
