"""Lines for people and for machines: what happened, to which request, in numbers; never a prompt, an answer or a key.

Whatever came from outside (ids, paths, names) is escaped and capped here, in the formatter, so that no caller of
`logger.info` can forget it: one event is one line.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from typing import TextIO

import msgspec

LINE_CHARS = 8192  # a longer line is cut: log shippers split or drop them
PACKAGE = "quire"

logger = logging.getLogger(f"{PACKAGE}.server")


class PlainFormatter(logging.Formatter):
    """`INFO 11-21 23:51:21 server: text`"""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(record.created))
        return _one_line(f"{record.levelname} {when} {record.name.removeprefix(PACKAGE + '.')}: {_text(record)}")


class JsonFormatter(logging.Formatter):
    """`{"time": "2026-11-21T23:51:21Z", "level": "info", "logger": "quire.server", "message": "…"}`"""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line = {
            "time": when,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _one_line(_text(record)),
        }
        return msgspec.json.encode(line).decode()


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the moment: while a bar is drawn, lines go above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup(level: str, as_json: bool) -> None:
    """Send our lines and uvicorn's to stderr in one format."""
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    for name in (PACKAGE, "uvicorn.error"):
        target = logging.getLogger(name)
        target.handlers = [handler]
        target.propagate = False
        target.setLevel(level.upper())
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.setLevel("WARNING")  # its milestones are ours already
    uvicorn.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """A failed start has been explained in one line before uvicorn prints its traceback."""
    return not record.getMessage().startswith(("Traceback", "Application startup failed"))


def where(error: BaseException) -> str:
    """The type and the frames of an error without its message and values: those may hold a caller's text."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    trail = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {trail}"


def _text(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        text = f"{text}: {where(record.exc_info[1])}"
    return text


def _one_line(text: str) -> str:
    text = text[:LINE_CHARS]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
