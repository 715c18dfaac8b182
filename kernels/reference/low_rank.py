"""A low-rank side path of a linear layer: one for all rows (LoRC, arXiv 2303.08302) or one per request (LoRA)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import op


class LowRank(NamedTuple):
    """R pairs of factors; y = x · wᵀ + (x · bᵀ) · aᵀ. Ranks below r are padded with zeros."""

    b: Tensor  # [R, r, K]
    a: Tensor  # [R, N, r]


@op
def low_rank(y: Tensor, x: Tensor, factors: LowRank, index: Tensor) -> Tensor:
    """y[t] + (x[t] · b[index[t]]ᵀ) · a[index[t]]ᵀ, in fp32, rounded once; y [T, N], x [T, K]; may overwrite y.

    index [T] int64: which pair each row takes, -1 = none.
    """
    used = index.clamp(min=0)
    inner = torch.einsum("tk,trk->tr", x.float(), factors.b[used].float())
    side = torch.einsum("tr,tnr->tn", inner, factors.a[used].float())
    return torch.where(index[:, None] >= 0, y.float() + side, y.float()).to(y.dtype)
