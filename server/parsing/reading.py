"""How the samples of one request are read: from deltas to pieces as they come, or to one message at the end.

AnswerFormat, made with the prompt ──▶ Reading ── pieces(delta) ──▶ a stream
                                          └────── message(output) ─▶ a whole answer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...engine.outputs import Delta, SampleOutput
from ...scheduler.plan import TokenLogprob
from .parser import AnswerParser
from .pieces import CallArguments, CallBegin, Content, Parser, Piece, Reasoning
from .syntaxes import Syntax, Tags


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """What a request's answer may hold beside content; the first five are the parser's.

    markup_ids         the special tokens that are markup: the parser has to see their text
    parallel_calls     False = the first call of a sample is kept, others are dropped
    include_reasoning  False = thinking is counted, and not shown
    named_call         the request named the function: what is asked for is no reason to finish
    """

    tags: Tags | None = None
    syntax: Syntax | None = None
    opened: bool = False
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    markup_ids: frozenset[int] = frozenset()
    parallel_calls: bool = True
    include_reasoning: bool = True
    named_call: bool = False

    def parser(self) -> Parser | None:
        """For one sample; None = all of its text is content."""
        if self.tags is None and self.syntax is None:
            return None
        return AnswerParser(
            tags=self.tags, syntax=self.syntax, opened=self.opened, tools=self.tools, hidden=self.hidden
        )

    def keeps(self, piece: Piece) -> bool:
        if isinstance(piece, Reasoning):
            return self.include_reasoning
        return self.parallel_calls or not isinstance(piece, CallBegin | CallArguments) or piece.call == 0

    def kept(self, num_calls: int) -> int:
        """Of so many calls."""
        return num_calls if self.parallel_calls else min(num_calls, 1)

    def finish_reason(self, reason: str | None, num_calls: int) -> str | None:
        """A sample that ended by itself after a call waits for the result."""
        return "tool_calls" if reason == "stop" and num_calls and not self.named_call else reason


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """One sample, whole."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    finish_reason: str | None = None


class Reading:
    """The samples of one request as they are read.

    reasoning_tokens  drawn for thinking so far, tags included
    said              if `tells_tokens`: the tokens of content that the last delta brought, and how many calls stand
                      before each
    """

    def __init__(self, format: AnswerFormat, *, tells_tokens: bool = False) -> None:
        self.reasoning_tokens = 0
        self.said: list[tuple[int, TokenLogprob]] = []
        self._format = format
        self._tells_tokens = tells_tokens
        self._samples: dict[int, _Sample] = {}

    def pieces(self, delta: Delta) -> list[Piece]:
        """What `delta` brings, which may be nothing: text that may become markup waits, while its tokens are out.

        The last delta of a sample gets its finish_reason from here as well: "tool_calls", if that is why it ended.
        """
        sample = self._samples.get(delta.index)
        if sample is None:
            parser = self._format.parser() or (AnswerParser() if self._tells_tokens else None)
            if parser is None:
                return [Content(delta.text)] if delta.text else []
            sample = self._samples[delta.index] = _Sample(parser)
        pieces = sample.parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            pieces += sample.parser.finish()
            delta.finish_reason = self._format.finish_reason(delta.finish_reason, sample.parser.num_calls)
            del self._samples[delta.index]
        self.reasoning_tokens += sample.count_reasoning(delta.offsets)
        if self._tells_tokens:
            self.said = [(self._format.kept(num_calls), token) for num_calls, token in sample.take_said(delta)]
        return [piece for piece in pieces if self._format.keeps(piece)]

    def message(self, output: SampleOutput) -> Message:
        """A sample that has ended."""
        parser = self._format.parser()
        if parser is None:
            return Message(content=output.text, finish_reason=output.finish_reason)
        message = fold([piece for piece in parser.push(output.text) + parser.finish() if self._format.keeps(piece)])
        message.finish_reason = self._format.finish_reason(output.finish_reason, parser.num_calls)
        self.reasoning_tokens += _Sample(parser).count_reasoning(output.offsets)
        return message


class _Sample:
    """A parser, and the tokens that are not yet known to be thinking."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser
        self._offsets: deque[int] = deque()
        self._tokens: deque[tuple[int, TokenLogprob]] = deque()

    def take_said(self, delta: Delta) -> Iterator[tuple[int, TokenLogprob]]:
        """Of the tokens of `delta`, and those before that were undecided: content, and behind how many calls it is."""
        self._tokens.extend(zip(delta.offsets, delta.logprobs or (), strict=False))
        content = self.parser.content
        while self._tokens and content:
            offset, token = self._tokens[0]
            if offset < content[0].end:
                self._tokens.popleft()
                if offset >= content[0].start:
                    yield content[0].num_calls, token
            elif len(content) > 1:
                content.popleft()
            else:
                return

    def count_reasoning(self, offsets: list[int]) -> int:
        """Of the tokens that begin at these characters, and those before that were undecided: what is thinking."""
        if self.parser.thinks is False and not self._offsets and not self.parser.reasoning_chars:
            return 0
        self._offsets.extend(offsets)
        count = 0
        while self._offsets and self._offsets[0] < self.parser.reasoning_chars:
            self._offsets.popleft()
            count += 1
        if self.parser.thinks is False:
            self._offsets.clear()
        return count


def fold(pieces: list[Piece]) -> Message:
    """Pieces of one sample as a message."""
    message = Message()
    for piece in pieces:
        if isinstance(piece, Content):
            message.content += piece.text
        elif isinstance(piece, Reasoning):
            message.reasoning += piece.text
        elif isinstance(piece, CallBegin):
            message.calls.append(Call(piece.id, piece.name))
        else:
            message.calls[-1].arguments += piece.text
    return message
