"""Tokens to text while they are drawn: whole characters only, and never a part of a stop string.

    id ──Detokenizer──▶ characters ──StopChecker──▶ text that may be shown

Both work one token at a time and in constant time per byte, so that the result does not depend on how many tokens
arrived together.
"""

from __future__ import annotations

import codecs
from typing import NamedTuple

from .tokenizer import Tokenizer


class Detokenizer:
    """The text of one sample, piece by piece: `push` per token and one `finish` concatenate to the whole decode.

    Bytes that do not yet make a character wait for the next token; U+FFFD appears only where the whole text has it.

    opens_document        nothing but special tokens came before (`Tokenizer.opens_document`)
    skip_special_tokens   special tokens have no text
    markup_ids            but for these
    spaces_between_special_tokens  False: where a special token follows another, its own leading spaces are dropped
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        opens_document: bool = False,
        skip_special_tokens: bool = True,
        markup_ids: frozenset[int] = frozenset(),
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = opens_document
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        if markup_ids:
            self._hidden -= markup_ids
        self._spaces_between_special = spaces_between_special_tokens
        self._last_was_special = False

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes."""
        if token_id in self._hidden:
            return ""
        special = token_id in self._tokenizer.special_ids
        data = self._tokenizer.token_bytes(token_id)
        if self._at_start and data:
            data, self._at_start = self._tokenizer.at_start(data), False
        if special and self._last_was_special and not self._spaces_between_special:
            data = data.lstrip(b" ")
        self._last_was_special = special
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


class Released(NamedTuple):
    """Text that may be shown now; `stop` is the stop string that ended the sample, if one did."""

    text: str
    stop: str | None = None


class StopChecker:
    """Finds the first stop string to be completed and holds back whatever might become one.

    One prefix function per stop string (Knuth, Morris, Pratt 1977): after each character the matched length is known,
    and the longest of them is exactly the text that may not be shown yet. Where several strings are completed by the
    same character the longest counts, so nothing of any of them is shown.

    include_stop  the stop string is shown; then nothing is held back either
    """

    def __init__(self, stop: tuple[str, ...], include_stop: bool = False) -> None:
        self._stop = stop
        self._fallbacks = [_prefix_function(text) for text in stop]
        self._matched = [0] * len(stop)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> Released:
        """`text` is what one token added. A match completed while not `may_stop` (min_tokens) is ordinary text."""
        if not self._stop:
            return Released(text)
        for i, char in enumerate(text):
            completed = self._advance(char)
            if completed and may_stop:
                stop = max(completed, key=len)
                seen = self._held + text[: i + 1]
                self._held = ""
                return Released(seen if self._include_stop else seen[: len(seen) - len(stop)], stop)
        seen = self._held + text
        keep = 0 if self._include_stop else max(self._matched)
        shown = len(seen) - keep
        self._held = seen[shown:]
        return Released(seen[:shown])

    def finish(self) -> str:
        """The held text: the sample ended otherwise, so it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> list[str]:
        """Feed one character to every stop string; those that it completes."""
        completed = []
        for s, stop in enumerate(self._stop):
            fallback, matched = self._fallbacks[s], self._matched[s]
            while matched and stop[matched] != char:
                matched = fallback[matched - 1]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop):
                completed.append(stop)
                matched = fallback[matched - 1]
            self._matched[s] = matched
        return completed


def _prefix_function(pattern: str) -> list[int]:
    """Per position the length of the longest proper prefix of `pattern` that ends there."""
    lengths = [0] * len(pattern)
    matched = 0
    for i in range(1, len(pattern)):
        while matched and pattern[i] != pattern[matched]:
            matched = lengths[matched - 1]
        if pattern[i] == pattern[matched]:
            matched += 1
        lengths[i] = matched
    return lengths
