"""Verification of drafted trees; see src/verify.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import implements
from .library import OUT_OF_MEMORY, OUT_OF_RANGE, Kernel
from .sampling import usable

# Columns of all trees together up to which one thread is faster: another that sleeps takes 40 us to come, in which one
# core verifies chains of six over so many (measured on a Sapphire Rapids core). A tree is one thread's work.
_WALKED_ALONE = 1 << 15

_verify = Kernel("verify", "ippii" + "pp" + "ppp" + "pp")


@implements("verify", "native", when=usable)
def verify(
    target: Tensor,
    draft: Tensor,
    tokens: Tensor,
    parents: Tensor,
    seeds: Tensor,
    sample_index: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """See the reference. IndexError for a token outside of the vocabulary, where the walk comes to it."""
    trees, nodes, vocab = target.shape
    if draft.shape != target.shape or tokens.shape != (trees, nodes) or parents.shape != (trees, nodes):
        raise ValueError(
            f"verify: target {list(target.shape)}, draft {list(draft.shape)}, tokens {list(tokens.shape)} and "
            f"parents {list(parents.shape)} do not belong together"
        )
    # Kept, so that what a copy owns outlives the call.
    columns = [x.contiguous() for x in (target, draft, tokens, parents, seeds, sample_index, positions)]
    accepted = torch.empty(trees, nodes, dtype=torch.bool)
    last = torch.empty(trees, dtype=torch.int64)
    p, q, *rest = [column.data_ptr() for column in columns]
    threads = 1 if trees == 1 or trees * vocab <= _WALKED_ALONE else None
    status = _verify(trees, p, q, nodes, vocab, *rest, accepted.data_ptr(), last.data_ptr(), threads=threads)
    if status == OUT_OF_RANGE:
        raise IndexError("verify: a drafted token is outside of the vocabulary")
    if status == OUT_OF_MEMORY:
        raise MemoryError("verify: no memory for the working buffers")
    return accepted, last
