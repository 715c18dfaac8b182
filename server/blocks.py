"""An answer as blocks in a row: thinking, text, calls of tools. What /v1/responses and /v1/messages have in common.

pieces (parsing/pieces.py) ──Blocks.add──▶ Opened, More, Closed …        Blocks.row: the same, whole
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..scheduler.plan import TokenLogprob
from .parsing.pieces import CallBegin, Content, Piece, Reasoning


@dataclass(slots=True)
class Block:
    """A stretch of one kind; every call is a block of its own.

    text    so far: what is said, or a call's arguments in JSON
    id      of a call: what its result names
    name    of a call: the function
    is_cut  the answer ended inside it, and not by itself
    tokens  of a text, if they were asked for: their log-probabilities; they may come before or after their text
    """

    index: int
    kind: Literal["thinking", "text", "call"]
    id: str = ""
    name: str = ""
    is_cut: bool = False
    parts: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Opened(NamedTuple):
    block: Block


class More(NamedTuple):
    block: Block
    text: str


class Closed(NamedTuple):
    block: Block


Change = Opened | More | Closed


class Blocks:
    """The blocks of one answer. At most the last one is open, from its Opened to its Closed."""

    def __init__(self) -> None:
        self.row: list[Block] = []

    def add(self, pieces: Iterable[Piece], said: Iterable[tuple[int, TokenLogprob]] = ()) -> list[Change]:
        """What `pieces` change, in their order; `said` are tokens of texts, as in Reading."""
        changes: list[Change] = []
        for piece in pieces:
            if isinstance(piece, CallBegin):
                self._open(changes, Block(len(self.row), "call", piece.id, piece.name))
                continue
            kind = _kind(piece)
            if not self.row or self.row[-1].kind != kind:
                self._open(changes, Block(len(self.row), kind))
            block = self.row[-1]
            block.parts.append(piece.text)
            changes.append(More(block, piece.text))
        for num_calls, token in said:
            self._text_behind(num_calls).tokens.append(token)
        return changes

    def _text_behind(self, num_calls: int) -> Block:
        """The text that stands behind so many calls: there is one, since tokens of it have been seen."""
        before = 0
        for block in self.row:
            if block.kind == "text" and before == num_calls:
                return block
            before += block.kind == "call"
        raise LookupError(num_calls)

    def end(self, *, is_cut: bool) -> list[Change]:
        """The answer has ended. One that said nothing is an empty text, so that there is a block in any case."""
        changes: list[Change] = []
        if not self.row:
            self._open(changes, Block(0, "text"))
        self.row[-1].is_cut = is_cut
        changes.append(Closed(self.row[-1]))
        return changes

    def _open(self, changes: list[Change], block: Block) -> None:
        if self.row:
            changes.append(Closed(self.row[-1]))
        self.row.append(block)
        changes.append(Opened(block))


def _kind(piece: Piece) -> Literal["thinking", "text", "call"]:
    if isinstance(piece, Content):
        return "text"
    return "thinking" if isinstance(piece, Reasoning) else "call"
