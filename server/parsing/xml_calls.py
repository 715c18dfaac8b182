"""Calls that are written in tags: <function=NAME> <parameter=KEY> VALUE </parameter> … </function>.

A value is text. What it means is the tool's to say: the type that its schema gives to the parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .calls import MAX_NAME, Calls, escaped
from .json_calls import objects
from .reader import Marks, Step, nowhere

FUNCTION, PARAMETER = "<function=", "<parameter="
FUNCTION_END, PARAMETER_END = "</function>", "</parameter>"
INSIDE = Marks([PARAMETER, FUNCTION_END])
VALUE_END = Marks([PARAMETER_END])
TAG_NAME = re.compile(r"[^<>\s]+")
MAX_REFERENCES = 8  # one after another; a schema may run in circles
Schema = Mapping[str, Any]
TYPES = {dict: "object", list: "array", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def tagged(calls: Calls) -> Step[bool]:
    """<function=NAME> or, where the model falls back to it, a JSON object."""
    reader = calls.reader
    yield from reader.spaces()
    if (yield from reader.peek()) == "{":
        return (yield from objects(calls))
    if not (yield from reader.starts(FUNCTION)):
        return False
    return (yield from function(calls))


def function(calls: Calls) -> Step[bool]:
    """From behind <function= to its end. Text between the parameters is dropped."""
    reader = calls.reader
    name = yield from reader.word(TAG_NAME, MAX_NAME)
    if name is None or not (yield from reader.starts(">")):
        return False
    calls.begin(name)
    types = _types(calls.tools.get(name, {}))
    opening = "{"
    while (mark := (yield from reader.until(INSIDE, nowhere))) == PARAMETER:
        key = yield from reader.word(TAG_NAME, MAX_NAME)
        if key is None or not (yield from reader.starts(">")):
            return False
        calls.add(f'{opening}"{escaped(key)}": ')
        opening = ", "
        if not (yield from _value(calls, types.get(key, frozenset({"string"})))):
            return False
    if not mark:
        return False
    if opening != "{":
        calls.add("}")
    calls.end()
    return True


def _value(calls: Calls, types: frozenset[str]) -> Step[bool]:
    """Up to </parameter>. The line break behind the tag and that before the next one belong to the tags."""
    reader = calls.reader
    yield from reader.starts("\n")
    if types == {"string"}:
        calls.add('"')
        text = _Unbroken(calls)
        found = yield from reader.until(VALUE_END, text.add)
        if found:
            calls.add('"')
        return bool(found)
    parts: list[str] = []
    found = yield from reader.until(VALUE_END, parts.append)
    if found:
        calls.add(_literal("".join(parts).removesuffix("\n"), types))
    return bool(found)


class _Unbroken:
    """A string argument as it comes, less a line break at its end."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._held = ""

    def add(self, text: str) -> None:
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._calls.add(escaped(text.removesuffix("\n")))


def _literal(text: str, types: frozenset[str]) -> str:
    """The JSON that `text` is, if its type is one of `types`; else a string of it. No types: an object or array is."""
    try:
        kind = TYPES.get(type(json.loads(text, parse_constant=_refuse)))
    except (ValueError, RecursionError):
        kind = None
    allowed = types or {"object", "array"}
    if kind in allowed or (kind == "integer" and "number" in allowed):
        return text.strip()
    python = {"True": "true", "False": "false", "None": "null"}.get(text.strip())
    if python is not None and TYPES[type(json.loads(python))] in allowed:
        return python
    return f'"{escaped(text)}"'


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity, which are no JSON


def _types(schema: Schema) -> dict[str, frozenset[str]]:
    """Of each parameter: the JSON types that it may have; none = its schema does not say."""
    properties = schema.get("properties")
    return {key: types_of(value, schema) for key, value in properties.items()} if isinstance(properties, dict) else {}


def types_of(schema: object, root: Schema) -> frozenset[str]:
    """The JSON types that a schema allows; none = it does not say. root: the whole, whose definitions it may name."""
    schema = resolved(schema, root)
    if not isinstance(schema, dict):
        return frozenset()
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset({given})
    if isinstance(given, list):
        return frozenset(kind for kind in given if isinstance(kind, str))
    if isinstance(schema.get("enum"), list):
        return frozenset(TYPES.get(type(value), "string") for value in schema["enum"])
    branches = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return frozenset().union(*(types_of(branch, root) for branch in branches))


def resolved(schema: object, root: Schema) -> object:
    """What a schema's `$ref` into the whole stands for; itself where there is none."""
    for _ in range(MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root
        for part in reference[2:].split("/"):
            schema = schema.get(part) if isinstance(schema, dict) else None
    return None
