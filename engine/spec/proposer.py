"""What every proposer is: it looks at sequences, and guesses how they go on.

    views ──propose──▶ Draft | None for each ──▶ target's forward pass over all nodes ──verify──▶ tokens

Nothing that a proposer does can change what is generated: verification (kernels/reference/verify.py) keeps the target's
distribution whatever the guesses are, as long as `q` is what they were drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ...scheduler.drafts import DraftShape
from ...scheduler.plan import DraftPass
from ..sequence_state import SequenceState


class DraftTree(NamedTuple):
    """Guessed continuations of one sequence; node i's parent is node parents[i], -1 = the last real token.

    Parents precede children; siblings stand in the order in which they were drawn. A chain has parents[i] = i - 1.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def path(self, node: int) -> tuple[int, ...]:
        """The tokens from the root's child to `node`; of -1 none."""
        tokens: list[int] = []
        while node >= 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tuple(reversed(tokens))

    @property
    def is_chain(self) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def depths(self) -> list[int]:
        """Of each node; children of the root have 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths


class Draft(NamedTuple):
    """Guesses for one sequence.

    q   [1 + nodes, V] float32: what the children of the root (row 0) and of node i (row i + 1) were drawn from, before
        any was removed; rows of leaves are not read. None = the guesses are a function of the past (`match`).
    """

    tree: DraftTree
    q: Tensor | None = None


@dataclass(slots=True)
class View:
    """One sequence as a proposer sees it.

    token_ids    [n] int64: all that is known, prompt and output; the target has computed all but the last
    block_table  [B] int32: its KV blocks, with room for shape.nodes tokens behind the last
    state        its sampling parameters, and what they make of logits
    salt         sequences of different salts must not learn of each other
    go_on        see DraftOrder
    """

    slot: int
    token_ids: np.ndarray
    num_prompt: int
    block_table: np.ndarray
    state: SequenceState
    shape: DraftShape
    salt: str = ""
    go_on: float = 0.0


class Proposer(Protocol):
    """One method of guessing. What it keeps of a sequence it keeps by slot."""

    method: str

    def enter(self, slot: int) -> None:
        """Another sequence has this slot now."""

    def propose(self, views: Sequence[View]) -> tuple[list[Draft | None], DraftPass]:
        """Guesses for each view, at most shape.nodes of them in at most shape.depth levels; None = nothing to say.

        It may raise; the runner then asks for each view alone, and gives up those that raise again.
        """
