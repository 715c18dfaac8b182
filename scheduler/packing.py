"""Prepacking: which prompts and chunk tails share a step or a row (Zhao et al., arXiv 2404.09529).

`pack` fills a step of ragged rows: nothing is padded there but the last tile, so what it saves is needless cuts.
`pack_rows` fills rows of one fixed width, for models that are served through static shapes: each prompt is a segment,
attention is block-diagonal over segments and positions restart in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .budget import Budget

# A prompt that would fit whole into the next step gives way to smaller ones that fit whole into what is left of this
# one, but not more often than this: then it is cut.
PASSED_OVER = 4


class Want(NamedTuple):
    """Tokens at positions start .. start + tokens - 1, to be computed."""

    start: int
    tokens: int
    passed_over: int = 0  # steps in which others were taken in its stead


class Packed(NamedTuple):
    chosen: list[tuple[int, int]]  # (index of the want, tokens), by index
    passed_over: list[int]  # indices that gave way to a later one


def pack(wants: Sequence[Want], budget: Budget) -> Packed:
    """Fill `budget` from `wants`, which are in the order of their turn. Spends the budget.

    Wants are taken whole in their order. One that does not fit is cut if it is longer than a step anyway, or has been
    passed over often enough. Else the largest later ones that fit whole come first (best fit), and it gets the rest.
    """
    chosen: dict[int, int] = {}
    gave_way: list[int] = []
    alone = [budget.chunk(start, count) == count for start, count, _ in wants]
    pending = list(range(len(wants)))

    def take(i: int, count: int) -> None:
        chosen[i] = count
        pending.remove(i)
        budget.spend(wants[i].start, count)

    while pending:
        i = pending[0]
        start, count, passed_over = wants[i]
        fits = budget.chunk(start, count)
        if fits == count:
            take(i, count)
            continue
        if alone[i] and passed_over < PASSED_OVER:
            later = sorted((j for j in pending[1:] if wants[j].tokens <= budget.tokens), key=lambda j: -wants[j].tokens)
            for j in later:
                if budget.chunk(wants[j].start, wants[j].tokens) == wants[j].tokens:
                    take(j, wants[j].tokens)
                    if i not in gave_way:
                        gave_way.append(i)
            fits = budget.chunk(start, count)
        if not fits:
            break
        take(i, fits)
    return Packed(sorted(chosen.items()), [i for i in gave_way if chosen.get(i, 0) < wants[i].tokens])


class Segment(NamedTuple):
    """One prompt in a fixed-width row: its tokens are at columns start .. start + length - 1, at positions 0, 1, …"""

    prompt: int  # index
    start: int
    length: int


def pack_rows(lengths: Sequence[int], width: int) -> list[list[Segment]]:
    """Prompts into rows of `width`, by best fit decreasing: never more than 11/9 of the least number of rows, plus one.

    A row's unused columns are its end. Raises ValueError for a prompt that is empty or wider than a row.
    """
    for prompt, length in enumerate(lengths):
        if not 1 <= length <= width:
            raise ValueError(f"prompt {prompt} has {length} tokens: a row of width {width} takes 1 to {width}")
    rows: list[list[Segment]] = []
    free: list[int] = []
    for prompt in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        length = lengths[prompt]
        row = min((r for r in range(len(rows)) if free[r] >= length), key=lambda r: free[r], default=None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(width)
        rows[row].append(Segment(prompt, width - free[row], length))
        free[row] -= length
    return rows
