"""From the engine's chunks to what a caller reads: the one fold that streams and whole answers share.

Chunk ──RequestStream.fold──▶ Delta ──▶ an event of a stream, or SampleOutput.add
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..scheduler.plan import Chunk, TokenLogprob
from .detokenizer import Detokenizer, StopChecker
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """What one request asks of its text, beside `SamplingParams` which knows only ids.

    stop                           end a sample where its text comes to contain one of these; the text ends before it
    include_stop_str_in_output     the text ends after it instead; a stop token's own text is shown as well
    skip_special_tokens            special tokens have no text
    markup_ids                     but for these, which a parser reads and takes out of the text again
    spaces_between_special_tokens  False: leading spaces of a special token that follows another are dropped
    """

    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    markup_ids: frozenset[int] = frozenset()
    spaces_between_special_tokens: bool = True


@dataclass(slots=True)
class Delta:
    """News of one sample. All deltas of a sample concatenate to its answer.

    A token comes with the delta that completes its text; tokens of held text wait with it. Tokens after the one that
    completed a stop string never happened. `logprobs` and `offsets` lie beside `token_ids`.

    num_drawn      tokens drawn since the last delta, those of held text included
    num_drafted    tokens guessed since the last delta, for the model to verify
    num_accepted   of these, those that were drawn
    offsets        per token the character of the sample's text at which it starts
    finish_reason  None = goes on; "stop", "length", "repetition", "abort", "error", "expired"
    stop_reason    the stop string, or the stop token id; None for EOS
    error          why "error", or which promise "expired": "timeout", "deadline", "unreachable"
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_drawn: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    offsets: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing that a reader of a stream would see."""
        return not self.text and not self.token_ids and self.finish_reason is None


class _Token(NamedTuple):
    token_id: int
    start: int  # characters of the sample's text before it
    end: int
    logprob: TokenLogprob | None


class SampleStream:
    """The fold of one sample. After its end further chunks give empty deltas (the engine may be a step ahead)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: TextOptions,
        *,
        index: int = 0,
        min_tokens: int = 0,
        opens_document: bool = False,
    ) -> None:
        self.index = index
        self.num_tokens = 0  # drawn, up to the end of the sample
        self.finish_reason: str | None = None
        self._options = options
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(
            tokenizer,
            opens_document=opens_document,
            skip_special_tokens=options.skip_special_tokens,
            markup_ids=options.markup_ids,
            spaces_between_special_tokens=options.spaces_between_special_tokens,
        )
        self._stops = StopChecker(options.stop, options.include_stop_str_in_output)
        self._num_chars = 0  # of text made, held text included
        self._num_shown = 0
        self._waiting: list[_Token] = []

    def fold(self, chunk: Chunk) -> Delta:
        """The news in `chunk`. Raises nothing: whatever ids and logprobs it carries have text or have none."""
        delta = Delta(self.index)
        if self.finish_reason is not None:
            return delta
        logprobs = chunk.logprobs
        hides_last = chunk.finish_reason == "stop" and not self._options.include_stop_str_in_output
        for i, token_id in enumerate(chunk.token_ids):
            hidden = hides_last and i == len(chunk.token_ids) - 1
            self._push(delta, token_id, logprobs[i] if logprobs is not None else None, hidden)
            if delta.finish_reason is not None:
                break
        else:
            if chunk.finish_reason is not None:
                self._finish(delta, chunk)
        delta.num_drafted = chunk.num_drafted
        delta.num_accepted = min(chunk.num_accepted, delta.num_drawn)  # a guess behind a stop string was in vain
        self.finish_reason = delta.finish_reason
        self._num_shown += len(delta.text)
        self._release(delta)
        return delta

    def _push(self, delta: Delta, token_id: int, logprob: TokenLogprob | None, hidden: bool) -> None:
        start = self._num_chars
        text = "" if hidden else self._detokenizer.push(token_id)
        self.num_tokens += 1
        delta.num_drawn += 1
        self._num_chars += len(text)
        self._waiting.append(_Token(token_id, start, self._num_chars, logprob))
        self._show(delta, text)

    def _show(self, delta: Delta, text: str) -> None:
        if not self._options.stop:
            delta.text += text
            return
        released = self._stops.push(text, may_stop=self.num_tokens >= self._min_tokens)
        delta.text += released.text
        if released.stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", released.stop

    def _finish(self, delta: Delta, chunk: Chunk) -> None:
        """The engine ended the sample: half a character may be left, then the held text."""
        tail = self._detokenizer.finish()
        self._num_chars += len(tail)
        self._show(delta, tail)
        if delta.finish_reason is None:
            delta.text += self._stops.finish()
            delta.finish_reason, delta.stop_reason, delta.error = chunk.finish_reason, chunk.stop_reason, chunk.error

    def _release(self, delta: Delta) -> None:
        """Move the tokens whose text is out, all of them at the end, from waiting into the delta."""
        shown = self._num_shown
        ready = 0
        for token_id, start, end, logprob in self._waiting:
            if end > shown and self.finish_reason is None:
                break
            delta.token_ids.append(token_id)
            delta.offsets.append(min(start, shown))
            if logprob is not None:
                delta.logprobs = delta.logprobs or []
                delta.logprobs.append(logprob)
            ready += 1
        del self._waiting[:ready]


class RequestStream:
    """The samples of one request. A sample has state between its first chunk and its end only: n may be thousands.

    num_cached       prompt tokens that came from the prefix cache; 0 until the first chunk says
    prompt_logprobs  of the prompt's second token onwards, as far as they have come; None until the first came
    """

    def __init__(
        self, tokenizer: Tokenizer, options: TextOptions, prompt_ids: list[int], *, n: int = 1, min_tokens: int = 0
    ) -> None:
        self.num_cached = 0
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self._tokenizer = tokenizer
        self._options = options
        self._n = n
        self._min_tokens = min_tokens
        self._opens_document = tokenizer.opens_document(prompt_ids)
        self._open: dict[int, SampleStream] = {}
        self._ended: dict[int, bool] = {}  # sample -> by its text, while the engine would have gone on

    def fold(self, chunk: Chunk) -> Delta:
        """The news in `chunk`; empty for a sample that has ended."""
        self.num_cached = max(self.num_cached, chunk.num_cached)
        if chunk.prompt_logprobs:
            self.prompt_logprobs = (self.prompt_logprobs or []) + chunk.prompt_logprobs
        index = chunk.index
        if index in self._ended:
            return Delta(index)
        sample = self._open.get(index)
        if sample is None:
            sample = self._open[index] = SampleStream(
                self._tokenizer,
                self._options,
                index=index,
                min_tokens=self._min_tokens,
                opens_document=self._opens_document,
            )
        delta = sample.fold(chunk)
        if delta.finish_reason is not None:
            del self._open[index]
            self._ended[index] = chunk.finish_reason is None
        return delta

    @property
    def finished(self) -> bool:
        return len(self._ended) == self._n

    def ended_early(self, delta: Delta) -> bool:
        """`delta` ended its sample by a stop string, of which the engine knows nothing: send Abort for that sample."""
        return delta.finish_reason is not None and self._ended[delta.index]


@dataclass(slots=True, repr=False)
class SampleOutput:
    """One whole sample: the sum of its deltas, in whose terms the fields are explained."""

    index: int
    parts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def __repr__(self) -> str:
        reason = self.error or self.stop_reason
        return (
            f"SampleOutput(index={self.index}, text={self.text!r}, {len(self.token_ids)} tokens, "
            f"finish_reason={self.finish_reason!r}" + (f", {reason!r})" if reason is not None else ")")
        )

    def add(self, delta: Delta) -> None:
        self.parts.append(delta.text)
        self.token_ids += delta.token_ids
        self.offsets += delta.offsets
        self.num_drafted += delta.num_drafted
        self.num_accepted += delta.num_accepted
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason, self.error = delta.finish_reason, delta.stop_reason, delta.error
