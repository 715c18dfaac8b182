"""Calls whose arguments are written in JSON: an object with the name in it, or the name and then an object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from .calls import MAX_DEPTH, MAX_NAME, Calls
from .reader import Reader, Step, nowhere

NAME = re.compile(r"[\w.:-]+", re.ASCII)
SCALAR = re.compile(r"[\w.+-]+", re.ASCII)  # a number, true, false, null
BETWEEN = re.compile(r"[\s\w,:.+-]+", re.ASCII)  # of an object: neither a bracket nor a string
CONTROL = re.compile(r"[\x00-\x1f]")
CONTROL_ESCAPES = {code: json.dumps(chr(code))[1:-1] for code in range(0x20)}
# Possessive, all of them: nothing is tried twice.
WRITTEN = re.compile(r'(?:[^"\\]++|\\.)++', re.DOTALL)  # inside a string
STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
FLAT = re.compile(f"(?:{BETWEEN.pattern}+|{STRING.pattern})++", re.ASCII | re.DOTALL)
UP_TO_BRACKET = re.compile(f"(?:{BETWEEN.pattern}+|{STRING.pattern})*+[][{{}}]", re.ASCII | re.DOTALL)
KEYS = {"name": "name", "arguments": "arguments", "parameters": "arguments"}
OTHER_KEYS = frozenset({"type", "id", "index"})
MAX_KEY = 16


def objects(calls: Calls, bare: bool = False) -> Step[bool]:
    """{"name": …, "arguments": {…}}, or a list of such.

    bare: no mark said that this is a call, so only the name of one of the tools makes it one
    """
    reader = calls.reader
    yield from reader.spaces()
    if bare or not (yield from reader.starts("[")):
        return (yield from _object(calls, bare))
    while True:
        yield from reader.spaces()
        if not (yield from _object(calls, bare)):
            return False
        yield from reader.spaces()
        if not (yield from reader.starts(",")):
            return (yield from reader.starts("]"))


def bare_object(calls: Calls) -> Step[bool]:
    return objects(calls, bare=True)


def _object(calls: Calls, bare: bool) -> Step[bool]:
    """The members may come in any order; arguments that come before the name wait for it."""
    reader = calls.reader
    if not (yield from reader.starts("{")):
        return False
    begun = False
    waiting: list[str] = []
    while True:
        yield from reader.spaces()
        key = yield from quoted(reader, MAX_KEY)
        yield from reader.spaces()
        if (key not in KEYS and key not in OTHER_KEYS) or not (yield from reader.starts(":")):
            return False
        yield from reader.spaces()
        if key == "name":
            name = yield from quoted(reader, MAX_NAME)
            if not name or begun or (bare and name not in calls.tools):
                return False
            calls.begin(name)
            begun = True
            for text in waiting:
                calls.add(text)
        elif not (yield from _value(reader, nowhere if key in OTHER_KEYS else calls.add if begun else waiting.append)):
            return False
        yield from reader.spaces()
        if not (yield from reader.starts(",")):
            break
    if not begun or not (yield from reader.starts("}")):
        return False
    calls.end()
    return True


def _value(reader: Reader, emit: Callable[[str], None]) -> Step[bool]:
    """Arguments: an object; or one written inside a string, which some models do; or null for none."""
    first = yield from reader.peek()
    if first == '"':
        text = yield from quoted(reader, None)
        emit(text or "")
        return text is not None
    if first == "n":
        return (yield from reader.starts("null"))
    return (yield from json_value(reader, emit))


def json_value(reader: Reader, emit: Callable[[str], None]) -> Step[bool]:
    """One JSON value as it is written, brackets and strings balanced; what else is wrong with it is left as it is."""
    depth = 0
    while first := (yield from reader.peek()):
        if depth:  # what is there as a whole goes at once: character by character a megabyte takes seconds
            written, depth = reader.balanced(UP_TO_BRACKET, depth, MAX_DEPTH)
            written += reader.run(FLAT) if depth else ""
            if written:
                emit(_legal(written))
                if not depth:
                    return True
                continue
        if first == '"':
            if not (yield from _string(reader, emit)):
                return False
        elif first in "{[":
            depth += 1
            if depth > MAX_DEPTH:
                return False
            emit(reader.take())
        elif first in "}]" and depth:
            depth -= 1
            emit(reader.take())
        elif not depth:
            word = SCALAR.match(first)
            yield from reader.all_of(SCALAR, emit)
            return word is not None
        else:
            run = reader.run(BETWEEN)
            if not run:
                return False
            emit(run)
            continue
        if not depth:
            return True
    return False


def _string(reader: Reader, emit: Callable[[str], None]) -> Step[bool]:
    """A JSON string with its quotes. Line breaks and their like, which models write and JSON forbids, are escaped."""
    emit(reader.take())
    while first := (yield from reader.peek()):
        if first == '"':
            emit(reader.take())
            return True
        run = reader.run(WRITTEN)
        if not run:  # what the backslash escapes has not come yet
            reader.take()
            if not (yield from reader.peek()):
                return False
            run = "\\" + reader.take()
        emit(run.translate(CONTROL_ESCAPES))
    return False


def _legal(written: str) -> str:
    """JSON with all its strings closed; in these is no control character then."""
    if CONTROL.search(written) is None:
        return written
    return STRING.sub(lambda string: string[0].translate(CONTROL_ESCAPES), written)


def quoted(reader: Reader, most: int | None) -> Step[str | None]:
    """What a JSON string says; None for one that is none, or is longer than `most` as it is written."""
    if (yield from reader.peek()) != '"':
        return None
    written: list[str] = []
    size = 0
    reader.take()
    while first := (yield from reader.peek()):
        if first == '"':
            reader.take()
            return _said('"' + "".join(written) + '"')
        if most is not None and size > most:
            return None
        text = reader.run(WRITTEN, None if most is None else most + 1 - size)
        if not text:  # what the backslash escapes has not come yet, or is past the bound
            text = reader.take()
            if not (yield from reader.peek()):
                return None
            text += reader.take()
        written.append(text.translate(CONTROL_ESCAPES))
        size += len(text)
    return None


def _said(literal: str) -> str | None:
    """Half of a surrogate pair, which is no text, becomes U+FFFD."""
    try:
        text = json.loads(literal)
    except ValueError:
        return None
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(text, str) else None


ARGUMENTS_MARK, ID_MARK = "[ARGS]", "[CALL_ID]"


def named(calls: Calls) -> Step[bool]:
    """name{…} with two marks that may stand in between; or `objects`."""
    reader = calls.reader
    yield from reader.spaces()
    if (yield from reader.peek()) in ("[", "{"):
        return (yield from objects(calls))
    name = yield from reader.word(NAME, MAX_NAME)
    if name is None:
        return False
    if (yield from reader.starts(ID_MARK)):
        yield from reader.word(NAME, MAX_NAME)
    yield from reader.starts(ARGUMENTS_MARK)
    yield from reader.spaces()
    return (yield from _arguments(calls, name))


FENCE = re.compile("`+")
SEPARATOR = "<｜tool▁sep｜>"


def fenced(calls: Calls) -> Step[bool]:
    """name<sep>{…}, or function<sep>name, a line break and the object in a fence of JSON."""
    reader = calls.reader
    yield from reader.spaces()
    name = yield from reader.word(NAME, MAX_NAME)
    if name is None or not (yield from reader.starts(SEPARATOR)):
        return False
    yield from reader.spaces()
    if (yield from reader.peek()) != "{":
        name = yield from reader.word(NAME, MAX_NAME)
        yield from reader.spaces()
        if (yield from reader.word(FENCE, 3)):
            yield from reader.starts("json")
            yield from reader.spaces()
    if name is None:
        return False
    if not (yield from _arguments(calls, name)):
        return False
    yield from reader.spaces()
    yield from reader.word(FENCE, 3)
    return True


def _arguments(calls: Calls, name: str) -> Step[bool]:
    if (yield from calls.reader.peek()) != "{":
        return False
    calls.begin(name)
    whole = yield from json_value(calls.reader, calls.add)
    calls.end()
    return whole
