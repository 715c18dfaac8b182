"""The trees that RSD is compared with: several chains drawn independently of each other, as SpecInfer and SpecTr do.

    W chains of L tokens, each from the draft model with noise of its own ──▶ one tree ──▶ target ──▶ the round's tokens

Siblings may be equal, which wastes rows. Verification goes through the candidates of a node in turn, all drawn from the
same q: x is accepted with probability min(1, p(x) / q(x)), else p becomes norm((p - q)_+) (Miao et al. 2023,
arXiv 2305.09781, algorithm 2; Sun et al. 2023, arXiv 2310.15141).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.spec.proposer import Draft, DraftTree


def join(chains: Sequence[Draft]) -> Draft:
    """Chains from one context as one tree, equal tokens apart; q row by row as `Draft` has it."""
    tokens: list[int] = []
    parents: list[int] = []
    rows = [chains[0].q[:1]] if chains[0].q is not None else []
    for chain in chains:
        if chain.q is None:
            raise ValueError("only drawn chains can be joined")
        first = len(tokens)
        tokens += chain.tree.tokens
        parents += [-1 if parent < 0 else parent + first for parent in chain.tree.parents]
        rows.append(chain.q[1:])
    return Draft(DraftTree(tuple(tokens), tuple(parents)), torch.cat(rows))


def accepted(draft: Draft, p: Tensor, generator: torch.Generator) -> list[int]:
    """The tokens of the round, given the target's distributions p [1 + nodes, V]: accepted ones, and one more."""
    tokens, parents = draft.tree
    if draft.q is None:
        raise ValueError("only drawn trees can be judged so")
    out: list[int] = []
    same = [-1]  # nodes that stand behind the same tokens; any of them has their p and q
    while True:
        left, q = p[same[0] + 1].clone(), draft.q[same[0] + 1]
        children = [node for node, parent in enumerate(parents) if parent in same]
        taken: int | None = None
        for node in children:
            x = tokens[node]
            if torch.rand((), generator=generator) * q[x] < left[x]:
                taken = x
                break
            rest = (left - q).clamp_(min=0)
            left = rest / rest.sum() if rest.sum() > 0 else left
        if taken is None:
            return [*out, int(torch.multinomial(left, 1, generator=generator))]
        out.append(taken)
        same = [node for node in children if tokens[node] == taken]
