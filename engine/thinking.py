"""Where a sample stands in its thinking, by its tokens: when its end is due, and where the answer behind it begins.

    before ──start ids──▶ inside ──end ids, drawn or forced──▶ behind          other ids than start: behind at once

A budget forces the end: once so many tokens were drawn inside, the next ones can only be those that end it, or what is
missing of them. What a grammar says holds for the answer alone, from its first token behind the thinking.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..scheduler.params import Thinking


class Place(NamedTuple):
    """matched: how much of the start (before) or of the end (inside) the last tokens are; drawn: tokens inside."""

    phase: str  # "before", "inside", "behind"
    matched: int = 0
    drawn: int = 0


class Outlook(NamedTuple):
    """What a token behind some path has to know.

    forced  the only id that it may be; None = the budget does not care
    answer  the tokens of the path that are the answer's; None = the thinking is not over
    opens   it may yet begin the thinking
    """

    forced: int | None
    answer: tuple[int, ...] | None
    opens: bool


class ThinkingState:
    """One sample's place. constrained: a grammar waits for the answer, so a start that has begun must go on."""

    def __init__(self, thinking: Thinking, *, constrained: bool = False) -> None:
        self._thinking = thinking
        self._constrained = constrained
        self._place = Place("inside" if thinking.opened else "before")

    def append(self, token: int) -> tuple[int, ...]:
        """It was drawn; the tokens that are known now to be the answer's."""
        self._place, answer = self._advance(self._place, token)
        return answer

    def extend(self, tokens: Iterable[int]) -> list[int]:
        return [one for token in tokens for one in self.append(token)]

    def after(self, path: Sequence[int]) -> Outlook:
        """Behind what was drawn and then `path`."""
        place, answer = self._place, []
        for token in path:
            place, told = self._advance(place, token)
            answer += told
        thinking = self._thinking
        if place.phase == "behind":
            return Outlook(None, tuple(answer), opens=False)
        if place.phase == "before":
            forced = thinking.start_ids[place.matched] if place.matched and self._constrained else None
            return Outlook(forced, None if forced is not None else (), opens=not place.matched)
        due = thinking.budget is not None and place.drawn >= thinking.budget
        return Outlook(thinking.end_ids[place.matched] if due else None, None, opens=False)

    def _advance(self, place: Place, token: int) -> tuple[Place, tuple[int, ...]]:
        """The next place, and the tokens that turn out to be the answer's."""
        start, end = self._thinking.start_ids, self._thinking.end_ids
        if place.phase == "behind":
            return place, (token,)
        if place.phase == "before":
            if token != start[place.matched]:
                return Place("behind"), (*start[: place.matched], token)
            matched = place.matched + 1
            return (Place("inside") if matched == len(start) else Place("before", matched)), ()
        seen = (*end[: place.matched], token)
        matched = next(k for k in range(len(seen), -1, -1) if seen[len(seen) - k :] == end[:k])
        return (Place("behind") if matched == len(end) else Place("inside", matched, place.drawn + 1)), ()
