"""Rounding that makes up for its own errors: GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1).

Inputs are rounded one after the other; what rounding one of them does to the layer's output, on inputs as they really
come, is made good by those that are still to be rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.packed import PackedWeight
from ...kernels.reference.int4 import choose_range, from_codes

# Added to the diagonal, as a share of its mean: moments of few or alike inputs can then be inverted (section 3.3).
DAMPING = 0.01


def round_with_feedback(weight: Tensor, moments: Tensor, group: int) -> PackedWeight:
    """Four-bit codes with zero points for weight [N, K], K a multiple of the group.

    moments [K, K] fp32: Σ x xᵀ over inputs x of the layer; inputs that never occurred (a zero on the diagonal) get the
    weight 0. A group's range is chosen when its turn has come, for the weights as they then are.
    """
    w, upper = _prepare(weight, moments)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales, zeros = [], []
    for first in range(0, w.shape[1], group):
        columns = slice(first, first + group)
        block, errors = w[:, columns].clone(), torch.zeros_like(w[:, columns])
        triangle = upper[columns, columns]
        scale, zero = choose_range(block, triangle.diagonal().square().reciprocal())
        for i in range(group):
            column = block[:, i : i + 1]
            code = (column / scale + zero).round().clamp(0, 15)
            codes[:, first + i] = code.squeeze(1).to(torch.uint8)
            errors[:, i : i + 1] = (column - (code - zero) * scale) / triangle[i, i]
            block[:, i + 1 :] -= errors[:, i : i + 1] @ triangle[i : i + 1, i + 1 :]
        w[:, first + group :] -= errors @ upper[columns, first + group :]
        scales.append(scale.squeeze(1))
        zeros.append(zero.squeeze(1))
    return from_codes(codes, torch.stack(scales), torch.stack(zeros), group)


def _prepare(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Weights to be changed, and the upper Cholesky factor of the inverse of the damped moments."""
    w, moments = weight.float().clone(), moments.float().clone()
    never = moments.diagonal() == 0
    w[:, never] = 0
    moments[never, never] = 1
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return w, torch.linalg.cholesky(inverse, upper=True)
