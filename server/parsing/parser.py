"""The one parser of answers: thinking first, if there is any, then text with calls of tools in it.

    text ──▶ [thinking] ──▶ content ◀──▶ call, call …

It is a generator over a `Reader`, so the text may be cut anywhere; what the markup is, `syntaxes.py` says. White space
next to markup is layout and is dropped; so is markup that is spelled by special tokens, wherever it stands. Markup that
turns out to begin no call is text again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import Any

from .calls import Body, Calls, Pieces, call_id
from .pieces import Content, Piece, Reasoning, Stretch
from .reader import Marks, Reader, Step, nowhere
from .syntaxes import Syntax, Tags


class AnswerParser:
    """A `Parser` (pieces.py).

    tags, syntax  None = the model does not think, or no call is looked for
    opened        the prompt has opened the thinking
    tools         the functions that may be called: name -> JSON schema of its arguments
    hidden        markup that the caller must not see: what the model spells by special tokens
    """

    def __init__(
        self,
        *,
        tags: Tags | None = None,
        syntax: Syntax | None = None,
        opened: bool = False,
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self._tags = tags
        self._syntax = syntax
        self._opened = opened
        self._hidden = hidden
        self._reader = Reader()
        self._pieces = Pieces()
        self._calls = Calls(self._reader, self._pieces, tools or {}, syntax.make_id if syntax else call_id)
        self._held: list[str] = []  # white space that may turn out to be layout
        self.content: deque[Stretch] = deque()
        self._behind_mark = False
        self.thinks: bool | None = None if tags is not None else False
        self._reasoning_chars = 0
        self._steps: Generator[None, None, None] = self._answer()
        next(self._steps)

    @property
    def num_calls(self) -> int:
        return self._calls.num_calls

    @property
    def reasoning_chars(self) -> int:
        return self._reader.position if self.thinks else self._reasoning_chars

    def push(self, text: str) -> list[Piece]:
        self._reader.feed(text)
        next(self._steps)
        return self._pieces.take()

    def finish(self) -> list[Piece]:
        self._reader.end()
        next(self._steps, None)
        return self._pieces.take()

    def _answer(self) -> Generator[None, None, None]:
        yield
        if self._tags is not None:
            yield from self._thinking(self._tags)
        if self._syntax is None:
            yield from self._plain()
        else:
            yield from self._text_and_calls(self._syntax)

    def _thinking(self, tags: Tags) -> Step[None]:
        before = yield from self._reader.spaces()
        self.thinks = (yield from self._reader.starts(tags.start)) or self._opened or tags.always
        if not self.thinks:
            self._say(before)
            return
        self._behind_mark = True
        yield from self._reader.until(Marks([tags.end]), self._think)
        self.thinks = False
        self._reasoning_chars = self._reader.position
        self._mark()

    def _plain(self) -> Step[None]:
        hidden = self._tag_marks()
        while (yield from self._reader.until(hidden, self._say)):
            self._mark()
        self._say_held()

    def _tag_marks(self, *marks: str) -> Marks:
        """`marks`, and those tags of thinking that are hidden: one that closes nothing is not to be seen either."""
        tags = () if self._tags is None else (self._tags.start, self._tags.end)
        return Marks([*marks, *(tag for tag in tags if tag in self._hidden)])

    def _text_and_calls(self, syntax: Syntax) -> Step[None]:
        marks = self._tag_marks(*syntax.marks)
        if syntax.bare is not None:
            self._say((yield from self._reader.spaces()))
            opening, body = syntax.bare
            if (yield from self._reader.peek()) == opening:
                yield from self._calls_in_a_row(syntax, body)
        while mark := (yield from self._reader.until(marks, self._say)):
            if mark in syntax.bodies:
                yield from self._calls_in_a_row(syntax, syntax.bodies[mark], mark)
            elif mark in self._hidden or mark in syntax.layout or self._behind_mark:
                self._mark()
            else:
                self._say(mark)
        self._say_held()

    def _call(self, syntax: Syntax, body: Body, mark: str) -> Step[bool]:
        """What follows a mark that opens a call; whether one has begun."""
        before = self.num_calls
        self._reader.record()
        clean = yield from body(self._calls)
        consumed = self._reader.recorded()
        if self.num_calls == before:
            if before and not (yield from self._reader.peek()):
                self._mark()  # cut off in the next of several calls
                return False
            if mark in self._hidden:
                self._mark()
                mark = ""
            self._say(mark + consumed)
            return False
        yield from self._reader.spaces()
        if syntax.closes and (not clean or (yield from self._reader.peek()) in ("}", "]")):
            yield from self._reader.until(Marks(syntax.closes), nowhere)
        self._mark()
        return True

    def _calls_in_a_row(self, syntax: Syntax, body: Body, mark: str = "") -> Step[None]:
        """A call, and the bare ones that follow it."""
        begun = yield from self._call(syntax, body, mark)
        while begun and syntax.bare is not None and syntax.between:
            if not (yield from self._reader.starts(syntax.between)):
                return
            yield from self._reader.spaces()
            opening, body = syntax.bare
            if (yield from self._reader.peek()) != opening:
                self._say(syntax.between)
                return
            begun = yield from self._call(syntax, body, "")

    def _mark(self) -> None:
        """Markup stood here: white space on both sides of it says nothing."""
        self._held.clear()
        self._behind_mark = True

    def _say(self, text: str) -> None:
        self._speak(text, Content)

    def _think(self, text: str) -> None:
        self._speak(text, Reasoning)

    def _speak(self, text: str, kind: Callable[[str], Piece]) -> None:
        """White space at the end of what is known waits: markup may follow."""
        if self._behind_mark:
            text = text.lstrip()
            if not text:
                return
            self._behind_mark = False
        solid = text.rstrip()
        if solid:
            if kind is Content:
                self._locate(text, len(text) - len(solid))
            for held in self._held:
                self._pieces.add(kind(held))
            self._held.clear()
            self._pieces.add(kind(solid))
        if len(solid) < len(text):
            self._held.append(text[len(solid) :])

    def _locate(self, text: str, blank: int) -> None:
        """Content has been found: what was held, and `text`, which has just been read, but for `blank` at its end."""
        position, calls = self._reader.position, self.num_calls
        start = position - len(text) - sum(map(len, self._held))
        if self.content and self.content[-1].end == start and self.content[-1].num_calls == calls:
            start = self.content.pop().start
        self.content.append(Stretch(start, position - blank, calls))

    def _say_held(self) -> None:
        """The sample ends in white space: it is part of the answer."""
        if self._held:
            self._locate("", 0)
        for held in self._held:
            self._pieces.add(Content(held))
        self._held.clear()
