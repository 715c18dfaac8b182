"""Which guessed tokens the target keeps: lossless verification of chains and trees.

Two rules, one for each kind of guess. Both leave the output distributed exactly as without guesses.

match    For guesses that are a function of the past (n-gram look-up, greedy drafts, prompt copies). The target draws at
         every node with the noise of that position, as it would without guesses, and the walk goes down while the draw
         is among the children. A child x survives with probability p(x), a miss is distributed as p without the
         children: the point-mass case of rejection sampling. As the noise is the same, so are the very tokens.
verify   For guesses drawn from a distribution q, siblings without replacement (Jeon et al. 2024, arXiv 2402.14160; on
         a chain, Leviathan et al. 2023, arXiv 2211.17192). It accepts more, since it uses that q is near p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import op
from . import noise
from .noise import Purpose


def match(draws: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
    """The accepted nodes of one tree, root to leaf.

    draws    the target's own token at the root and after each node: len(tokens) + 1
    tokens, parents  the tree; -1 is the root, parents precede children
    The tokens of the step are those of the path, then draws at its end: draws[path[-1] + 1], or draws[0].
    """
    path: list[int] = []
    current = -1
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == current and token == draws[current + 1]:
            path.append(node)
            current = node
    return path


@op
def verify(
    target: Tensor,
    draft: Tensor,
    tokens: Tensor,
    parents: Tensor,
    seeds: Tensor,
    sample_index: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Recursive rejection sampling of B trees in lockstep.

    A tree has N rows: row 0 is the root (the last real token), row i + 1 is node i; shorter trees are padded.
    target  [B, N, V] float32: p(. | row), after temperature and filters
    draft   [B, N, V] float32: q(. | row), which the row's children were drawn from, before any was removed
    tokens  [B, N] int64: each row's token; row 0 is not read
    parents [B, N] int64: each row's parent row, parents before children, siblings in the order they were drawn;
            -1 for the root and for padding
    seeds, sample_index, positions [B] int64: a position is that of the token after the root
    Returns accepted [B, N] bool, the rows of the path below the root, and the token [B] int64 that follows the path.

    At a row with children x_1, x_2, ..., with p_1 = p and q_1 = q, child x_i is accepted with probability
    min(1, p_i(x_i) / q_i(x_i)); else p_{i+1} = norm((p_i - q_i)_+) and q_{i+1} = norm(q_i without x_i). After the last
    one a token is drawn from what p has become. One pass in row order does it: a rejected row never becomes current, so
    its descendants are never looked at.
    """
    current = torch.zeros_like(positions)
    depth = torch.zeros_like(positions)
    tried = torch.zeros_like(positions)  # children of the current row that were rejected
    p, q = target[:, 0].clone(), draft[:, 0].clone()
    accepted = torch.zeros_like(tokens, dtype=torch.bool)
    for row in range(1, tokens.shape[1]):
        live = (parents[:, row] == current).nonzero().squeeze(1)
        if live.numel() == 0:
            continue
        x = tokens[live, row]
        u = noise.uniform(
            seeds[live], sample_index[live], (positions + depth)[live], Purpose.ACCEPT, tried[live, None]
        ).squeeze(1)
        taken = u * q[live, x] < p[live, x]

        kept, rest = live[taken], live[~taken]
        accepted[kept, row] = True
        current[kept], tried[kept] = row, 0
        depth[kept] += 1
        p[kept], q[kept] = target[kept, row], draft[kept, row]

        tried[rest] += 1
        p[rest], q[rest] = _after_rejection(p[rest], q[rest], x[~taken])
    g = noise.gumbel(seeds, sample_index, positions + depth, Purpose.BONUS, p.shape[-1])
    return accepted, (p.log() + g).max(dim=-1).indices


def _after_rejection(p: Tensor, q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(p - q)_+ normalised, and q without x normalised: what the next sibling is judged by. p, q [R, V]; x [R]."""
    residual = (p - q).clamp_(min=0)
    mass = _mass(residual)
    # Where rounding leaves no residual, p and q are equal up to rounding, and p itself is as good.
    p = torch.where(mass > 0, residual / mass, p)
    rest = q.scatter(-1, x[:, None], 0.0)
    return p, rest / _mass(rest).clamp_(min=torch.finfo(rest.dtype).tiny)


def _mass(p: Tensor) -> Tensor:
    """Row sums [R, 1]. By cumsum, since sum() splits a lone long row over threads and so rounds it in another way."""
    return p.cumsum(dim=-1)[:, -1:]
