"""Guesses without a model: what stood behind the same tokens before.

    the sequence's last tokens ──▶ where else in its prompt and output? ──▶ what followed there
                               └─▶ in what other sequences wrote (outputs.py), if that agrees on more tokens

Prompt lookup: Saxena 2023; the lookup among other outputs by a suffix automaton: Hu et al., "SAM Decoding", 2024
(arXiv 2411.10666). The guesses are a function of the past, so verification needs no distribution of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from ...scheduler.drafts import DraftShape
from ...scheduler.plan import DraftPass
from .outputs import REMEMBERED_TOKENS, Outputs, Place
from .proposer import Draft, DraftTree, View

# Tokens that must agree before anything is guessed. Of chains of four, on what the bundled model writes at temperature
# 1 (and 0.5), a single token's guesses are accepted to 11 to 18 % (52 to 57), those of two to 24 to 33 % (65 to 71), of
# three to 32 to 39 % (71 to 76), but those are half to four fifths as many. Of equal matches the latest is as good
# as a vote of all, within 1 % of the tokens per pass, and better than the first.
SHORTEST = 2
# Agreement beyond this tells nothing more about what follows.
LONGEST = 16
# Earlier places that are compared, the latest first: a bound for texts that repeat one token.
PLACES = 256
# Tokens of one sequence that are written among the outputs in one step: a returning sequence brings many, and each
# takes some microseconds.
WRITTEN_AT_ONCE = 256


def earlier(tokens: np.ndarray, longest: int = LONGEST) -> tuple[np.ndarray, np.ndarray]:
    """Where the last SHORTEST tokens of [n] int64 stood before: (starts [k], lengths [k]), the longest match first.

    starts are the indices of the tokens behind; lengths say how many tokens agree, at most `longest`. Of equally long
    matches the latest is first. Only the latest PLACES are looked at.
    """
    n = len(tokens)
    if n <= SHORTEST:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    found = tokens[SHORTEST - 1 : -1] == tokens[-1]
    for i in range(1, SHORTEST):
        found &= tokens[SHORTEST - 1 - i : -1 - i] == tokens[-1 - i]
    starts = np.flatnonzero(found)[: -PLACES - 1 : -1] + SHORTEST
    if not len(starts):
        return starts, starts
    back = np.arange(1, min(longest, n) + 1)
    places = starts[:, None] - back
    agree = (tokens[places] == tokens[n - back]) & (places >= 0)
    lengths = agree.argmin(1)
    lengths[lengths == 0] = len(back)  # SHORTEST tokens agree, so the first is the least only where all are equal
    order = np.argsort(-lengths, kind="stable")
    return starts[order], lengths[order]


def continuation(tokens: np.ndarray, start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; a text that ends before goes on with the guess itself, as a repetition does."""
    period = len(tokens) - start
    return [int(token) for token in tokens[start + np.arange(count) % period]]


def merge(continuations: Iterable[Sequence[int]], shape: DraftShape) -> DraftTree:
    """The tree of these continuations as far as the shape has room; the first ones come first."""
    tokens: list[int] = []
    parents: list[int] = []
    children: list[dict[int, int]] = [{}]  # of the root, then of each node: token -> node
    in_level = [0] * shape.depth
    for guess in continuations:
        if len(tokens) == shape.nodes:
            break
        node = -1
        for level, token in enumerate(guess[: shape.depth]):
            siblings = children[node + 1]
            if token not in siblings:
                if (len(siblings) if shape.kind == "rsd-c" else in_level[level]) == shape.widths[level]:
                    break
                in_level[level] += 1
                siblings[token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                children.append({})
            node = siblings[token]
    return DraftTree(tuple(tokens), tuple(parents))


class NgramProposer:
    method = "ngram"

    def __init__(self, remembered: int = REMEMBERED_TOKENS) -> None:
        """remembered: tokens of other sequences' outputs that are kept to guess by."""
        self._outputs = Outputs(remembered)
        self._places: dict[int, tuple[Place, int]] = {}  # slot -> where its text stands, tokens of it written or passed

    def enter(self, slot: int) -> None:
        self._places.pop(slot, None)

    def propose(self, views: Sequence[View]) -> tuple[list[Draft | None], DraftPass]:
        began = time.perf_counter()
        for view in views:
            self._write(view)
        drafts = [self._guess(view) for view in views]
        return drafts, DraftPass(self.method, 0, 0, time.perf_counter() - began)

    def _write(self, view: View) -> None:
        """What the sequence has drawn since the last time, and first the end of its prompt as what leads there."""
        place, done = self._places.get(view.slot, (None, max(view.num_prompt - LONGEST, 0)))
        known = len(view.token_ids)
        tokens = view.token_ids[max(done, known - WRITTEN_AT_ONCE) :].tolist()
        self._places[view.slot] = self._outputs.write(view.salt, place, tokens), known

    def _guess(self, view: View) -> Draft | None:
        tokens, depth = view.token_ids, view.shape.depth
        starts, lengths = earlier(tokens)
        own: Iterable[list[int]] = (continuation(tokens, start, depth) for start in starts[: view.shape.nodes].tolist())
        others, agreed = self._outputs.continuation(view.salt, tokens[-LONGEST:].tolist(), depth)
        if agreed < SHORTEST:
            others = []
        better = not len(lengths) or agreed > lengths[0]
        tree = merge(chain([others], own) if better else chain(own, [others]), view.shape)
        return Draft(tree) if tree.tokens else None
