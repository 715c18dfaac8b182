"""How much is guessed: shapes of drafts, and what a step orders of whom.

    chain:4        four tokens, one after another
    rsd-c:2,2,1    a tree: two children of the root, two of each of these, one of each of those
    rsd-s:3x4      a tree: the three best nodes of every level kept by stochastic beam search, four levels

Trees: Recursive Speculative Decoding (Jeon et al. 2024, arXiv 2402.14160).
"""

from __future__ import annotations

import re
from itertools import accumulate
from operator import mul
from typing import NamedTuple

# A mask of 64 bits says which rows of its sequence a row sees, and the last real token is one of them.
MAX_NODES = 63

_CHAIN = re.compile(r"chain(?::(\d+))?")
_CONSTANT = re.compile(r"rsd-c:(\d+(?:,\d+)*)")
_BEAM = re.compile(r"rsd-s:(\d+)x(\d+)")


class DraftShape(NamedTuple):
    """widths: by level, of "chain" all 1, of "rsd-c" the children of each node, of "rsd-s" the nodes of the level."""

    kind: str
    widths: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Tokens that may be accepted."""
        return len(self.widths)

    @property
    def nodes(self) -> int:
        """Rows of the target, beside that of the last real token."""
        return sum(accumulate(self.widths, mul)) if self.kind == "rsd-c" else sum(self.widths)

    def cut(self, depth: int) -> DraftShape:
        """Its first levels."""
        return DraftShape(self.kind, self.widths[:depth])

    def __str__(self) -> str:
        if self.kind == "chain":
            return f"chain:{self.depth}"
        if self.kind == "rsd-c":
            return f"rsd-c:{','.join(map(str, self.widths))}"
        return f"rsd-s:{max(self.widths, default=0)}x{self.depth}"


def chain(depth: int) -> DraftShape:
    return DraftShape("chain", (1,) * depth)


def parse_shape(text: str, depth: int) -> DraftShape:
    """The shape of this name; `depth` is that of a chain that names none. ValueError for what is no shape."""
    if match := _CHAIN.fullmatch(text):
        shape = chain(int(match[1] or depth))
    elif match := _CONSTANT.fullmatch(text):
        shape = DraftShape("rsd-c", tuple(map(int, match[1].split(","))))
    elif match := _BEAM.fullmatch(text):
        shape = DraftShape("rsd-s", (int(match[1]),) * int(match[2]))
    else:
        raise ValueError(f"{text!r} is no shape of drafts; write chain, chain:4, rsd-c:2,2,1 or rsd-s:3x4")
    if not shape.widths or min(shape.widths) < 1 or shape.nodes > MAX_NODES:
        raise ValueError(f"{text!r} has {shape.nodes} nodes; 1 to {MAX_NODES} can be verified at once")
    return shape


class DraftOrder(NamedTuple):
    """What is to be guessed behind one sequence's last token. Less may come of it, never more.

    method  of the proposer: "ngram", or the engine's own method
    go_on   a chain takes another guess only while all before it are right with at least this probability, as far as
            the proposer can tell; 0 = always
    """

    method: str
    shape: DraftShape
    go_on: float = 0.0
