"""Calls that are written as Python: [name(key=value, …), …] with literals for values, which become JSON on the way.

Nothing is evaluated or compiled: a literal is read character by character.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .calls import MAX_DEPTH, MAX_NAME, Calls, escaped
from .reader import Reader, Step

NAME = re.compile(r"[\w.]+", re.ASCII)
KEY = re.compile(r"\w+")
NUMBER = re.compile(r"[\w.+-]+", re.ASCII)
WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
MAX_NUMBER = 400  # characters; the largest float written out has 309
# What needs no look at what comes next: all but \U and the halves of a pair.
ESCAPE = r"\\(?:x([0-9a-fA-F]{2})|u((?![dD][89a-fA-F])[0-9a-fA-F]{4})|([^xuU]))"
ESCAPED = re.compile(ESCAPE, re.DOTALL)
STRING = {quote: re.compile(rf"(?:[^{quote}\\]++|{ESCAPE})++", re.DOTALL) for quote in "\"'"}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
HEX = re.compile(r"[0-9a-fA-F]+")
CLOSES = {"[": "]", "(": ")", "{": "}"}

Emit = Callable[[str], None]


def pythonic(calls: Calls) -> Step[bool]:
    """A list of calls, the first of which names one of the tools: prose may begin with a bracket, too."""
    reader = calls.reader
    yield from reader.spaces()
    if not (yield from reader.starts("[")):
        return False
    while True:
        yield from reader.spaces()
        name = yield from reader.word(NAME, MAX_NAME)
        if name is None or name not in calls.tools or not (yield from reader.starts("(")):
            return False
        calls.begin(name)
        if not (yield from _arguments(calls)):
            return False
        calls.end()
        yield from reader.spaces()
        if not (yield from reader.starts(",")):
            return (yield from reader.starts("]"))


def _arguments(calls: Calls) -> Step[bool]:
    """key=value, … up to the closing parenthesis."""
    reader = calls.reader
    opening = "{"
    while True:
        yield from reader.spaces()
        if (yield from reader.starts(")")):
            if opening != "{":
                calls.add("}")
            return True
        key = yield from reader.word(KEY, MAX_NAME)
        yield from reader.spaces()
        if key is None or not (yield from reader.starts("=")):
            return False
        calls.add(f'{opening}"{key}": ')
        opening = ", "
        if not (yield from _value(reader, calls.add, 1)):
            return False
        yield from reader.spaces()
        if not (yield from reader.starts(",")) and (yield from reader.peek()) != ")":
            return False


def _value(reader: Reader, emit: Emit, depth: int) -> Step[bool]:
    yield from reader.spaces()
    first = yield from reader.peek()
    if first and first in "\"'":
        return (yield from _string(reader, emit))
    if first in CLOSES:
        return depth < MAX_DEPTH and (yield from _collection(reader, emit, depth))
    word = yield from reader.word(NUMBER, MAX_NUMBER)
    if not (yield from reader.peek()):
        return False  # it may have been cut
    text = None if word is None else WORDS.get(word) or _number(word)
    emit(text or "")
    return text is not None


def _collection(reader: Reader, emit: Emit, depth: int) -> Step[bool]:
    """A list, a tuple, or a dictionary whose keys are strings."""
    opening = reader.take()
    emit("{" if opening == "{" else "[")
    separator = ""
    while True:
        yield from reader.spaces()
        if (yield from reader.starts(CLOSES[opening])):
            emit("}" if opening == "{" else "]")
            return True
        emit(separator)
        separator = ", "
        if opening == "{":
            quote = yield from reader.peek()
            if not quote or quote not in "\"'" or not (yield from _string(reader, emit)):
                return False
            yield from reader.spaces()
            if not (yield from reader.starts(":")):
                return False
            emit(": ")
        if not (yield from _value(reader, emit, depth + 1)):
            return False
        yield from reader.spaces()
        if not (yield from reader.starts(",")) and (yield from reader.peek()) != CLOSES[opening]:
            return False


def _string(reader: Reader, emit: Emit) -> Step[bool]:
    quote = reader.take()
    emit('"')
    while first := (yield from reader.peek()):
        if first == quote:
            reader.take()
            emit('"')
            return True
        run = reader.run(STRING[quote])
        text = ESCAPED.sub(_meaning, run) if run else (yield from _escape(reader))
        if text is None:
            return False
        emit(escaped(text))
    return False


def _meaning(escape: re.Match[str]) -> str:
    byte, code, kind = escape.groups()
    return _simple(kind) if kind else chr(int(byte or code, 16))


def _simple(kind: str) -> str:
    """What a backslash and this character say; where they mean nothing they stay, as in Python."""
    return ESCAPES.get(kind, kind if kind in "\\'\"" else "\\" + kind)


def _escape(reader: Reader) -> Step[str | None]:
    """What a backslash and what follows it say, piece by piece; None if it is cut, or wrong."""
    reader.take()
    kind = yield from reader.peek()
    if not kind:
        return None
    reader.take()
    if kind not in HEX_DIGITS:
        return _simple(kind)
    digits = yield from _hex(reader, HEX_DIGITS[kind])
    if digits is None:
        return None
    code = int(digits, 16)
    if 0xD800 <= code < 0xDC00 and (yield from reader.starts("\\u")):  # JSON's way beyond the first 65536
        low = yield from _hex(reader, 4)
        if low is None:
            return None
        code = 0x10000 + (code - 0xD800) * 0x400 + (int(low, 16) - 0xDC00)
    return chr(code) if 0 <= code <= 0x10FFFF and not 0xD800 <= code < 0xE000 else "\ufffd"


def _hex(reader: Reader, count: int) -> Step[str | None]:
    digits = ""
    while len(digits) < count and (yield from reader.peek()):
        run = reader.run(HEX, count - len(digits))
        if not run:
            return None
        digits += run
    return digits if len(digits) == count else None


def _number(word: str) -> str | None:
    """As JSON writes it: Python also knows 1_000, 0x1F, .5 and 5."""
    if JSON_NUMBER.fullmatch(word):
        return word
    try:
        return str(int(word, 0))
    except ValueError:
        pass
    try:
        value = float(word)
    except ValueError:
        return None
    return repr(value) if value - value == 0 else None  # neither infinite nor NaN
