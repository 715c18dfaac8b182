"""Answers as models of each kind write them, and what they say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from quire.server.parsing.parser import AnswerParser
from quire.server.parsing.pieces import CallArguments, CallBegin, Piece
from quire.server.parsing.reading import Message, fold
from quire.server.parsing.syntaxes import SYNTAXES, TAGS, Syntax

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
        "parts": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object"},
        "ratio": {"type": "number"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
}
TOOLS = {"get_weather": WEATHER, "now": {"type": "object", "properties": {}}}
Calls = list[tuple[str, dict[str, Any]]]


def spell(syntax: Syntax, calls: Calls, *, ascii_only: bool = False) -> str:
    """Calls in the syntax's own spelling."""
    how = syntax.spelling
    arguments = {"json": _json, "tags": _tags, "python": _python}[how.arguments]
    spelled = [f"{how.before}{name}{how.middle}{arguments(values, ascii_only)}{how.after}" for name, values in calls]
    return how.first + how.between.join(spelled) + how.last


def _json(values: dict[str, Any], ascii_only: bool) -> str:
    return json.dumps(values, ensure_ascii=ascii_only)


def _tags(values: dict[str, Any], ascii_only: bool) -> str:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=ascii_only)

    return "".join(f"<parameter={key}>\n{text(value)}\n</parameter>\n" for key, value in values.items())


def _python(values: dict[str, Any], ascii_only: bool) -> str:
    spelled = ascii if ascii_only else repr
    return ", ".join(f"{key}={spelled(value)}" for key, value in values.items())


def parser(syntax: Syntax | None, *, tags: str | None = None, **options: Any) -> AnswerParser:
    return AnswerParser(syntax=syntax, tags=TAGS[tags] if tags else None, **{"tools": TOOLS, **options})


def pieces(parser: AnswerParser, parts: Iterable[str]) -> list[Piece]:
    found = [piece for part in parts for piece in parser.push(part)]
    return found + parser.finish()


def read(parser: AnswerParser, parts: Iterable[str]) -> Message:
    return fold(pieces(parser, parts))


def said(message: Message) -> tuple[str, str, list[tuple[str, str]]]:
    """All but the ids, which differ each time."""
    return message.content, message.reasoning, [(call.name, call.arguments) for call in message.calls]


def check_order(found: list[Piece]) -> None:
    """Calls are numbered from 0, begin once, and their arguments follow before the next begins."""
    begun = 0
    for piece in found:
        if isinstance(piece, CallBegin):
            assert piece.call == begun
            begun += 1
        elif isinstance(piece, CallArguments):
            assert piece.call == begun - 1
            assert piece.text
        else:
            assert piece.text


ALL = tuple(SYNTAXES.values())
