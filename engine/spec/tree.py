"""Growing guesses, level by level: chains, and the trees of Recursive Speculative Decoding.

    frontier ──a model──▶ log q of each node ── + Gumbel noise ──▶ the largest of each ──▶ children ──▶ next frontier

The b largest of log q(y) + noise are b draws from q without replacement, in the order in which they were drawn
(Gumbel-top-k; Kool et al. 2019, arXiv 1903.06059). With b = 1 that is a plain draw from q.

rsd-c  every node has the level's number of children (Jeon et al. 2024, arXiv 2402.14160)
rsd-s  stochastic beam search: of all children of a level those with the largest perturbed path, log q of the path plus
       noise, so that likely parents have more children than unlikely ones (the same; Kool et al. 2019)

How many children of a node survive in a beam does not depend on who the next of them is, given those before it: so
`verify` is exact for both. Without noise the largest are simply the likeliest, and guesses are a function of the past.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from ...scheduler.drafts import DraftShape
from .proposer import DraftTree


class Best(NamedTuple):
    """The best children of one node, best first, at least as many as the level is wide if there are.

    log_q   of each, given the node
    keys    what they were ranked by: log_q, with noise where children are drawn; -inf = cannot be drawn
    """

    tokens: Sequence[int]
    log_q: Sequence[float]
    keys: Sequence[float]


class _Candidate(NamedTuple):
    """A child that a beam may keep."""

    rank: float  # log q of its path, perturbed where children are drawn
    parent: int
    token: int
    log_q: float  # of its path


class Growth:
    """One sequence's tree while it grows.

    shape     what it may become
    drawn     children are drawn; else they are the likeliest
    ends      tokens behind which nothing is guessed
    frontier  the nodes whose children come next; -1 = the last real token; empty = it has ended
    """

    def __init__(self, shape: DraftShape, drawn: bool, ends: Collection[int] = ()) -> None:
        self.shape, self.drawn, self.ends = shape, drawn, ends
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.paths: list[tuple[int, ...]] = []  # from the root's child to the node
        self.frontier = [-1] if shape.depth else []
        self.levels = 0
        self._log_q = [0.0]  # of the root's and each node's path
        self._rank = [0.0]

    @property
    def tree(self) -> DraftTree:
        return DraftTree(tuple(self.tokens), tuple(self.parents))

    @property
    def width(self) -> int:
        """How many children of one node may be needed for the next level."""
        return self.shape.widths[self.levels]

    def depth(self, node: int) -> int:
        return 0 if node < 0 else self.depths[node]

    def path(self, node: int) -> tuple[int, ...]:
        return () if node < 0 else self.paths[node]

    def extend(self, best: Sequence[Best]) -> None:
        """The next level. best: beside the frontier."""
        if self.shape.kind == "rsd-s":
            chosen = self._beam(best)
        else:
            pairs = zip(self.frontier, best, strict=True)
            chosen = [child for node, own in pairs for child in self._children(node, own)]
        first = len(self.tokens)
        for child in chosen:
            self._add(child)
        self.levels += 1
        more = self.levels < self.shape.depth
        self.frontier = [i for i in range(first, len(self.tokens)) if more and self.tokens[i] not in self.ends]

    def stop(self) -> None:
        """Nothing more is guessed."""
        self.frontier = []

    def _add(self, child: _Candidate) -> None:
        self.tokens.append(child.token)
        self.parents.append(child.parent)
        self.depths.append(self.depth(child.parent) + 1)
        self.paths.append((*self.path(child.parent), child.token))
        self._log_q.append(child.log_q)
        self._rank.append(child.rank)

    def _children(self, node: int, best: Best) -> list[_Candidate]:
        rows = zip(best.tokens, best.keys, strict=True)
        return [_Candidate(0.0, node, token, 0.0) for token, key in rows if key > -math.inf][: self.width]

    def _beam(self, best: Sequence[Best]) -> list[_Candidate]:
        """The largest of all children, largest first: so siblings stand in the order in which they were drawn."""
        found = []
        for node, one in zip(self.frontier, best, strict=True):
            above, bound = self._log_q[node + 1], self._rank[node + 1]
            for token, log_q, key in zip(*one, strict=True):
                if key > -math.inf:
                    rank = truncated(above + key, above + one.keys[0], bound) if self.drawn else above + log_q
                    found.append(_Candidate(rank, node, token, above + log_q))
        found.sort(key=lambda child: -child.rank)
        return found[: self.width]


def truncated(value: float, largest: float, bound: float) -> float:
    """A Gumbel variable of a set, given that the largest of the set, now `largest`, is `bound`.

    -log(exp(-bound) - exp(-largest) + exp(-value)), in a form that neither overflows nor cancels (Kool et al. 2019,
    appendix B.3).
    """
    if value >= largest:
        return bound
    v = bound - value + math.log(-math.expm1(value - largest))
    return bound - max(0.0, v) - math.log1p(math.exp(-abs(v)))
