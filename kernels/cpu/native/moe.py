"""Routing of tokens to experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.routing import check_top_k
from ...registry import implements
from .library import DTYPES, OUT_OF_MEMORY, Kernel, usable

_route = Kernel("route", "iipiiipp")


@implements("route", "native", when=usable)
def route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """See the reference."""
    logits = logits.contiguous()
    rows, experts = logits.shape
    check_top_k(top_k, experts)
    weights = torch.empty((rows, top_k), dtype=torch.float32)
    ids = torch.empty((rows, top_k), dtype=torch.int64)
    status = _route(
        rows,
        DTYPES[logits.dtype],
        logits.data_ptr(),
        experts,
        top_k,
        renormalize,
        weights.data_ptr(),
        ids.data_ptr(),
    )
    if status == OUT_OF_MEMORY:
        raise MemoryError("route: no memory for a row")
    return weights, ids
