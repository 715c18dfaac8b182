"""The Hadamard matrix in the weights of values and outputs, where the cache wants it: free once it is there.

    attention sums values by probabilities, so  W_o · Σ p · v  =  (W_o Hᵀ) · Σ p · (H v),  per head

(QuaRot, arXiv 2404.00456, section 4.) The rotation of keys cannot be folded: rotary angles stand in between.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Hadamard = Callable[[Tensor], Tensor]  # over the last dimension


def turn_rows(values: Tensor, head_dim: int, hadamard: Hadamard) -> Tensor:
    """W_v [Hk · D, d], or its bias [Hk · D], times H from the left, per head: fp32."""
    heads = values.float().reshape(-1, head_dim, *values.shape[1:]).movedim(1, -1)
    return hadamard(heads.contiguous()).movedim(-1, 1).reshape(values.shape)


def turn_columns(outputs: Tensor, head_dim: int, hadamard: Hadamard) -> Tensor:
    """W_o [d, Hq · D] times Hᵀ = H from the right, per head: fp32."""
    return hadamard(outputs.float().reshape(len(outputs), -1, head_dim)).reshape(outputs.shape)
