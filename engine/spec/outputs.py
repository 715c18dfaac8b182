"""What sequences have written lately, so that others may guess by it: by salt, and within a bound.

    a step's new tokens ──write──▶ automaton of the salt ──find──▶ what was written behind the same tokens

Sequences with different salts never see each other's tokens, as in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .suffix import ROOT, SuffixAutomaton

# Tokens that are remembered, at the most. They take about half a kilobyte each: 32 MB of the host.
REMEMBERED_TOKENS = 65_536


class Place(NamedTuple):
    """Where one sequence's text stands in the automaton that it is written into."""

    automaton: SuffixAutomaton
    state: int


class Outputs:
    """Two generations: the younger is written until it holds half of the tokens; then the older is forgotten."""

    def __init__(self, remembered: int = REMEMBERED_TOKENS) -> None:
        self._full = remembered // 2
        self._young: dict[str, SuffixAutomaton] = {}
        self._old: dict[str, SuffixAutomaton] = {}
        self._written = 0  # tokens in the younger

    def write(self, salt: str, place: Place | None, tokens: Sequence[int]) -> Place:
        """The sequence that stands at `place` goes on, None = it begins: where it stands now."""
        if self._written + len(tokens) > self._full:
            self._old, self._young, self._written = self._young, {}, 0
        self._written += len(tokens)
        automaton = self._young.get(salt)
        if automaton is None:
            automaton = self._young[salt] = SuffixAutomaton()
        state = place.state if place is not None and place.automaton is automaton else ROOT
        for token in tokens:
            state = automaton.write(state, token)
        return Place(automaton, state)

    def continuation(self, salt: str, tokens: Sequence[int], count: int) -> tuple[list[int], int]:
        """What was written behind the longest suffix of `tokens` that is known, and that suffix's length."""
        best: tuple[list[int], int] = [], 0
        for generation in (self._young, self._old):
            automaton = generation.get(salt)
            if automaton is not None:
                state, length = automaton.find(tokens)
                if length > best[1]:
                    best = automaton.read(state, count), length
        return best
