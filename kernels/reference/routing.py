"""Which experts a token goes to."""

from __future__ import annotations

from torch import Tensor

from ..registry import op


@op
def route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The top_k most probable experts of each token and their probabilities (Shazeer et al. 2017, section 2).

    logits [T, E] -> weights [T, k] fp32, the largest first, and ids [T, k] int64; of equal logits the lower id comes
    first. The softmax runs over all experts in fp32; renormalize then scales the k chosen to the sum 1. A row with a
    NaN has NaN for weights, and some k distinct ids. ValueError for a top_k outside of 1 .. E.
    """
    check_top_k(top_k, logits.shape[1])
    wide = logits.float()
    ids = wide.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = wide.softmax(dim=-1).gather(-1, ids)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


def check_top_k(top_k: int, experts: int) -> None:
    if not 1 <= top_k <= experts:
        raise ValueError(f"a token cannot go to {top_k} of {experts} experts")
