"""Calls that must be made, as a grammar: a model's own spelling of them, with arguments by their schemas.

    start: first call (between call){0,15} last     call: before (name middle arguments | name middle arguments …) after

Lark as llguidance reads it: %json embeds a JSON Schema, <[7]> is the token 7, which stands for markup that is a special
token. What it lets through, the parser of the same syntax reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...scheduler.params import Grammar
from .syntaxes import Syntax
from .xml_calls import PARAMETER, PARAMETER_END, Schema, resolved, types_of

# Between the parts of JSON: calls are written on one line.
WHITESPACE = " ?"
# A model that has lost its way repeats itself to the end of its tokens, and the last call is cut.
MAX_CALLS = 16


def tool_grammar(
    tools: Mapping[str, Schema],
    syntax: Syntax,
    special_ids: Mapping[str, int],
    *,
    parallel: bool = True,
    otherwise: Schema | None = None,
) -> Grammar:
    """At least one call of these functions; exactly one, or up to MAX_CALLS if `parallel`.

    tools        name -> JSON Schema of its arguments
    special_ids  markup that is a special token -> its id
    otherwise    or, instead of any call, JSON of this schema
    """
    how = syntax.spelling

    def literal(text: str) -> str:
        return _literal(text, special_ids)

    rules = []
    variants = []
    for i, (name, schema) in enumerate(tools.items()):
        rules += list(_ARGUMENTS[how.arguments](f"a{i}", {"type": "object", **schema}))
        variants.append(f"{literal(name + how.middle)} a{i}")
    more = f"({literal(how.between)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    answer = f"\n     | {_json(otherwise)}" if otherwise is not None else ""
    lines = [
        f"start: {literal(how.first)} call {more} {literal(how.last)}{answer}",
        f"call: {literal(how.before)} ({' | '.join(variants)}) {literal(how.after)}",
        *rules,
    ]
    return Grammar(kind="lark", source="\n".join(lines))


def _literal(text: str, special_ids: Mapping[str, int]) -> str:
    """`text`, in which special tokens are named by id."""
    if not text:
        return ""
    marks = "|".join(re.escape(mark) for mark in special_ids)
    parts = re.split(f"({marks})", text) if marks else [text]
    return " ".join(
        f"<[{special_ids[part]}]>" if part in special_ids else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )


def _json(schema: Schema) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': WHITESPACE}})}"


def _json_arguments(rule: str, schema: Schema) -> Iterator[str]:
    yield f"{rule}: {_json(schema)}"


def _tagged_arguments(rule: str, schema: Schema) -> Iterator[str]:
    """Parameters in the order of the schema; a text goes up to the tag that ends it."""
    parts = []
    for i, (key, value) in enumerate(_properties(schema)):
        opening, ending = _literal(f"{PARAMETER}{key}>\n", {}), _literal(f"\n{PARAMETER_END}\n", {})
        choices = value.get("enum")
        if isinstance(choices, list) and all(isinstance(item, str) for item in choices):
            yield f"{rule}_{i}: {opening} ({' | '.join(map(json.dumps, choices))}) {ending}"
        elif "string" in (types := types_of(value, schema)) or not types:
            yield f"{rule}_{i}: {opening} {rule}_{i}_text " + r'"\n"'
            yield f"{rule}_{i}_text[lazy]: {_UP_TO_END}"
        else:
            yield f"{rule}_{i}: {opening} {_json(value)} {ending}"
        parts.append(f"{rule}_{i}" + ("" if key in _required(schema) else "?"))
    yield f"{rule}: {' '.join(parts) or _EMPTY}"


def _python_arguments(rule: str, schema: Schema) -> Iterator[str]:
    """key=value in the order of the schema, commas only between those that are there: `rule`_i goes on from the i-th
    with none before it, `rule`_i_more with some."""
    properties = _properties(schema)
    for i, (key, value) in enumerate(properties):
        one = f"{_literal(f'{key}=', {})} {_json(value)} {rule}_{i + 1}_more"
        skip = key not in _required(schema)
        yield f"{rule}_{i}: {one}" + (f" | {rule}_{i + 1}" if skip else "")
        yield f'{rule}_{i}_more: ", " {one}' + (f" | {rule}_{i + 1}_more" if skip else "")
    yield f"{rule}_{len(properties)}: {_EMPTY}"
    yield f"{rule}_{len(properties)}_more: {_EMPTY}"
    yield f"{rule}: {rule}_0"


_EMPTY = '""'
_UP_TO_END = "/(?s:.*)" + PARAMETER_END.replace("/", "\\/") + "/"
_ARGUMENTS = {"json": _json_arguments, "tags": _tagged_arguments, "python": _python_arguments}


def _properties(schema: Schema) -> list[tuple[str, dict[str, Any]]]:
    """Each as what it refers to, with the definitions that this may refer to."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    found = [(key, resolved(value, schema)) for key, value in schema.get("properties", {}).items()]
    return [(key, {**value, **shared} if isinstance(value, dict) else shared) for key, value in found]


def _required(schema: Schema) -> list[str]:
    required: list[str] = schema.get("required", [])
    return required
