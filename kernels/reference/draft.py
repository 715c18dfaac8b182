"""Which children a node of a drafted tree is given: draws without replacement."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import op
from . import noise
from .noise import Purpose


@op
def draw_children(
    q: Tensor, count: int, seeds: Tensor, sample_index: Tensor, positions: Tensor, nodes: Tensor
) -> tuple[Tensor, Tensor]:
    """The `count` largest of log(q) + Gumbel noise in each row: so many draws from q without replacement, in the order
    in which they are drawn (Gumbel-top-k; Kool et al. 2019, arXiv 1903.06059). One is a plain draw.

    q [R, V] float32: a distribution per node; 1 <= count <= V
    seeds, sample_index, positions [R] int64: a position is that of the token being drawn
    nodes [R] int64: 0 = the root; the noise of node i is that of the columns i * V .. i * V + V - 1
    Returns tokens [R, count] int64 and keys [R, count] float32: log(q) + noise, largest first. Where less can be drawn,
    or q is NaN, the rest has keys of -inf and any tokens of the vocabulary.
    """
    columns = nodes[:, None] * q.shape[1] + torch.arange(q.shape[1], device=q.device)
    keys = q.log() + noise.gumbel(seeds, sample_index, positions, Purpose.DRAFT, columns)
    keys, tokens = keys.masked_fill(~(q > 0), -torch.inf).topk(count, dim=-1)
    return tokens, keys
