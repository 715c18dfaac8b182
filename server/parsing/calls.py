"""Calls as they are read: from how a model spells them to names and JSON arguments.

    Reader ──a body of json_calls, xml_calls, python_calls──▶ Calls ──▶ CallBegin, CallArguments …

A body is a generator that stands behind the mark that opens a call. It returns whether it could read to the call's end;
if it began none, all that it consumed is given back as text.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Mapping
from typing import Any

from .pieces import CallArguments, CallBegin, Piece
from .reader import Reader, Step

MAX_NAME = 256  # characters; OpenAI takes function names of 64
MAX_DEPTH = 64  # nesting inside arguments: twice what schemas at the door may have
ALPHANUMERIC = string.ascii_letters + string.digits


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """Mistral's templates refuse ids of any other form."""
    return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))


class Pieces:
    """Pieces as they are made; neighbours of one kind become one."""

    def __init__(self) -> None:
        self._made: list[Piece] = []
        self._texts: list[str] = []  # of the last one

    def add(self, piece: Piece) -> None:
        last = self._made[-1] if self._made else None
        if isinstance(piece, CallBegin):
            self._close()
        elif not piece.text:
            return
        elif type(piece) is not type(last) or _call(piece) != _call(last):
            self._close()
            self._texts = [piece.text]
        else:
            self._texts.append(piece.text)
            return
        self._made.append(piece)

    def take(self) -> list[Piece]:
        """All that were added since the last time."""
        self._close()
        made, self._made = self._made, []
        return made

    def _close(self) -> None:
        if len(self._texts) > 1:
            self._made[-1] = self._made[-1]._replace(text="".join(self._texts))  # type: ignore[call-arg]
        self._texts = []


def _call(piece: Piece | None) -> int | None:
    return piece.call if isinstance(piece, CallArguments) else None


class Calls:
    """The calls of one sample, and what their bodies read from.

    tools    the functions that may be called: name -> JSON schema of its arguments
    make_id  a new id for each call
    """

    def __init__(
        self,
        reader: Reader,
        pieces: Pieces,
        tools: Mapping[str, Mapping[str, Any]],
        make_id: Callable[[], str] = call_id,
    ) -> None:
        self.reader = reader
        self.tools = tools
        self.num_calls = 0
        self._pieces = pieces
        self._make_id = make_id
        self._is_empty = True

    def begin(self, name: str) -> None:
        """From here on nothing is given back."""
        self.reader.recorded()
        self._pieces.add(CallBegin(self.num_calls, self._make_id(), name))
        self.num_calls += 1
        self._is_empty = True

    def add(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        self._is_empty = self._is_empty and not text
        self._pieces.add(CallArguments(self.num_calls - 1, text))

    def end(self) -> None:
        if self._is_empty:
            self.add("{}")


Body = Callable[[Calls], Step[bool]]


def escaped(text: str) -> str:
    """`text` as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
