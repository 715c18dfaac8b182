"""Whether a growing sequence has begun to repeat itself: one pattern of tokens, again and again up to its end.

For each size of a pattern it is enough to know how many of the last tokens equal the one that many places before them:
`count` repetitions of `size` tokens are a run of size * (count - 1). So a token costs one comparison for each size.
"""

from __future__ import annotations

from collections.abc import Sequence

from .params import Repetition


class Loops:
    """Of one sample: what it has drawn, and nothing of its prompt."""

    def __init__(self, wish: Repetition) -> None:
        self._sizes = range(wish.min_pattern_size, wish.max_pattern_size + 1)
        self._repeats = wish.min_count - 1  # beside the pattern itself
        self._runs = [0] * len(self._sizes)

    def push(self, token_ids: Sequence[int], num_output: int) -> bool:
        """The last of `token_ids` has just been drawn, and num_output of them are output: is this a loop now?"""
        last, found = token_ids[-1], False
        for i, size in enumerate(self._sizes):
            if size < num_output and token_ids[-1 - size] == last:
                self._runs[i] += 1
                found = found or self._runs[i] >= size * self._repeats
            else:
                self._runs[i] = 0
        return found
