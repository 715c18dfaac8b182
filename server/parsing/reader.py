"""Text that comes in pieces, for parsers that are written as if all of it were there.

A parser is a generator: where it needs to see more it yields, and goes on when `feed` has brought more or `end` has
said that nothing follows. What is not consumed is never longer than what one step looks ahead, a mark or a name, so
reading costs the same however the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
Step = Generator[None, None, T]

SPACES = re.compile(r"[ \t\r\n]+")


class Marks:
    """Literal texts to look for. None may contain another: the first to be complete must be the one that is meant."""

    def __init__(self, marks: Iterable[str]) -> None:
        self.all = tuple(dict.fromkeys(marks))
        if any(a != b and a in b for a in self.all for b in self.all):
            raise ValueError(f"one of the marks {self.all} contains another")
        self._pattern = re.compile("|".join(map(re.escape, self.all)) or r"(?!)")
        self._beginnings = frozenset(mark[:i] for mark in self.all for i in range(1, len(mark)))
        self._longest = max(map(len, self.all), default=1)

    def find(self, text: str, start: int) -> re.Match[str] | None:
        return self._pattern.search(text, start)

    def begun(self, text: str, start: int) -> int:
        """Where a mark may have begun that `text` does not complete; its length if none has."""
        for i in range(max(start, len(text) - self._longest + 1), len(text)):
            if text[i] in self._beginnings and text[i:] in self._beginnings:
                return i
        return len(text)


class Reader:
    """The text from where the parser stands. `position`: characters consumed."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._before = 0
        self._ended = False
        self._tape: list[str] | None = None

    @property
    def position(self) -> int:
        return self._before + self._at

    def feed(self, text: str) -> None:
        self._before += self._at
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._ended = True

    def record(self) -> None:
        """Keep what is consumed from now on, to give it back."""
        self._tape = []

    def recorded(self) -> str:
        """What was consumed since `record`, which this ends."""
        tape, self._tape = self._tape or [], None
        return "".join(tape)

    def _consume(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = end
        if self._tape is not None:
            self._tape.append(text)
        return text

    def peek(self) -> Step[str]:
        """The next character; "" at the end."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def take(self) -> str:
        """Consume the character that `peek` saw."""
        return self._consume(self._at + 1)

    def starts(self, literal: str) -> Step[bool]:
        """Whether the text goes on with `literal`, which is consumed then."""
        while True:
            end = self._at + len(literal)
            if self._text.startswith(literal, self._at):
                self._consume(end)
                return True
            if self._ended or not literal.startswith(self._text[self._at : end]):
                return False
            yield

    def run(self, pattern: re.Pattern[str], most: int | None = None) -> str:
        """What `pattern` matches here of the text at hand, of its first `most` characters; "" if it does not."""
        end = len(self._text) if most is None else self._at + most
        match = pattern.match(self._text, self._at, end)
        return self._consume(match.end()) if match else ""

    def balanced(self, pattern: re.Pattern[str], depth: int, most: int) -> tuple[str, int]:
        """What `pattern` matches here again and again, a bracket at the end of each match, up to where `depth` brackets
        have closed; and how many are open then. Never more than `most` are.
        """
        text, end, begin = self._text, self._at, pattern.match
        while depth and (match := begin(text, end)):
            change = 1 if text[match.end() - 1] in "{[" else -1
            if depth + change > most:
                break
            end, depth = match.end(), depth + change
        return self._consume(end), depth

    def all_of(self, pattern: re.Pattern[str], emit: Callable[[str], None]) -> Step[None]:
        """The longest run of characters, each of which `pattern` matches."""
        while (yield from self.peek()):
            run = self.run(pattern)
            if not run:
                return
            emit(run)

    def spaces(self) -> Step[str]:
        """The white space that comes next."""
        found = self.run(SPACES)
        while self._at == len(self._text) and not self._ended:
            yield
            found += self.run(SPACES)
        return found

    def word(self, pattern: re.Pattern[str], most: int) -> Step[str | None]:
        """As `all_of`; None if it is empty or longer than `most`, of which then one character more is consumed."""
        found = ""
        while (yield from self.peek()) and len(found) <= most:
            run = self.run(pattern, most + 1 - len(found))
            if not run:
                break
            found += run
        return found if 0 < len(found) <= most else None

    def until(self, marks: Marks, emit: Callable[[str], None]) -> Step[str]:
        """All text before the first of the marks goes to `emit`; the mark, consumed, or "" at the end."""
        while True:
            match = marks.find(self._text, self._at)
            if match is not None:
                if match.start() > self._at:
                    emit(self._consume(match.start()))
                return self._consume(match.end())
            end = len(self._text) if self._ended else marks.begun(self._text, self._at)
            if end > self._at:
                emit(self._consume(end))
            if self._ended:
                return ""
            yield


def nowhere(text: str) -> None:
    """Where text goes that nobody reads."""
