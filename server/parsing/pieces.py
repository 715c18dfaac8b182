"""What a sample says, in the terms that every surface spells: content, reasoning, calls of tools.

    Delta.text (engine/outputs.py) ──Parser.push──▶ pieces ──▶ chat, responses, messages; streamed, or folded into one

All pieces of a sample, in their order, are its answer: the texts of one kind concatenate, those of a call are its JSON
arguments. A surface that streams spells each as it comes; a whole answer is the fold of the same.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol


class Content(NamedTuple):
    """Text of the answer itself."""

    text: str


class Reasoning(NamedTuple):
    """Text of the thinking before it."""

    text: str


class CallBegin(NamedTuple):
    """A call of a tool begins; calls of a sample are numbered from 0. id: unique in the answer, what a result names."""

    call: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """More of a call's arguments: all texts of a call concatenate to one JSON object.

    Unless the sample was cut off in the middle of it, or the model wrote something else: then it is what there was.
    """

    call: int
    text: str


Piece = Content | Reasoning | CallBegin | CallArguments


class Stretch(NamedTuple):
    """Content by where it stands in the sample's text: characters from start to end, behind so many calls."""

    start: int
    end: int
    num_calls: int


class Parser(Protocol):
    """Reads one sample's text as it comes. Where the text is cut into pushes makes no difference to the whole."""

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""

    @property
    def thinks(self) -> bool | None:
        """Whether what comes next is thinking; None = not known before there is more text. False stays."""

    @property
    def reasoning_chars(self) -> int:
        """Characters read so far that are thinking, its tags included: the first so many of the text."""

    @property
    def content(self) -> deque[Stretch]:
        """Where content stands, as far as it has been told. What lies between is markup, thinking, calls and layout.

        Whoever wants to know takes from its left, and leaves the last one, which may grow.
        """

    def push(self, text: str) -> list[Piece]:
        """The news in `text`; what could still become markup is held back. Raises nothing, whatever a model writes.

        Neighbouring pieces of one kind are one piece, and none is empty.
        """

    def finish(self) -> list[Piece]:
        """The sample has ended: what was held back."""
