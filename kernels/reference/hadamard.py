"""The Hadamard rotation of a head: spreads what stands out over all entries (QuaRot, arXiv 2404.00456, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import op


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@op
def hadamard(x: Tensor) -> Tensor:
    """x · H / √D over the last dimension, D a power of two, in fp32: [..., D] -> [..., D] in x's dtype.

    H is Sylvester's: H[i, j] = (-1)^popcount(i & j). It is symmetric and the rotation its own inverse.
    """
    size = x.shape[-1]
    if not is_power_of_two(size):
        raise ValueError(f"the rotation needs a power of two, the last dimension is {size}")
    out = x.float()
    half = 1
    while half < size:
        pairs = out.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        a, b = pairs.unbind(-2)
        out = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        half *= 2
    return (out * size**-0.5).to(x.dtype)
