"""All substrings of many texts, as a machine that reads one token after another: a suffix automaton.

A state stands for the substrings that end at the same places; it knows the longest of them, the state of the longest
suffix that ends at more places (its link), and what follows. Adding a token takes amortised constant time, and n tokens
make at most 2n states and 3n transitions. Blumer et al., "The smallest automaton recognizing the subwords of a text",
1985; several texts, each written from the root: Mohri, Moreno and Weinstein, "General suffix automaton construction
algorithm and space bounds", 2009.
"""

from __future__ import annotations

from collections.abc import Iterable

ROOT = 0
NOTHING = -1  # no link, and nothing seen behind a state


class SuffixAutomaton:
    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [NOTHING]
        self._length = [0]  # of the state's longest substring
        # The token written last behind the state. Of a substring that is a mere suffix of what is being written, it
        # may be an earlier one: passing the news on to all links would no longer take constant time.
        self._behind = [NOTHING]

    @property
    def num_states(self) -> int:
        return len(self._next)

    def write(self, state: int, token: int) -> int:
        """Go on with the text whose state this is, ROOT = begin one: the state to go on from."""
        known = self._next[state].get(token, NOTHING)
        if known != NOTHING:
            self._behind[state] = token
            return self._exactly(state, token, known)
        new = self._add(self._length[state] + 1, {}, NOTHING)
        while state != NOTHING and token not in self._next[state]:
            self._next[state][token] = new
            self._behind[state] = token
            state = self._link[state]
        if state == NOTHING:
            self._link[new] = ROOT
        else:
            self._behind[state] = token
            self._link[new] = self._exactly(state, token, self._next[state][token])
        return new

    def find(self, tokens: Iterable[int]) -> tuple[int, int]:
        """The longest suffix of `tokens` that something has been written behind: (its state, its length)."""
        state = length = 0
        for token in tokens:
            while token not in self._next[state] and state != ROOT:
                state = self._link[state]
                length = self._length[state]
            if token in self._next[state]:
                state = self._next[state][token]
                length += 1
        while self._behind[state] == NOTHING and state != ROOT:
            state = self._link[state]
            length = self._length[state]
        return state, length

    def read(self, state: int, count: int) -> list[int]:
        """What was written behind a state, at most `count` tokens: at each the one written last."""
        tokens: list[int] = []
        while len(tokens) < count and self._behind[state] != NOTHING:
            tokens.append(self._behind[state])
            state = self._next[state][tokens[-1]]
        return tokens

    def _exactly(self, state: int, token: int, target: int) -> int:
        """The state of state's longest substring with `token` behind it: its target, split if that says more."""
        length = self._length[state] + 1
        if self._length[target] == length:
            return target
        split = self._add(length, dict(self._next[target]), self._behind[target])
        self._link[split], self._link[target] = self._link[target], split
        while state != NOTHING and self._next[state].get(token) == target:
            self._next[state][token] = split
            state = self._link[state]
        return split

    def _add(self, length: int, following: dict[int, int], behind: int) -> int:
        self._next.append(following)
        self._link.append(NOTHING)
        self._length.append(length)
        self._behind.append(behind)
        return len(self._next) - 1
