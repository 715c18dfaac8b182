"""One API request between its parsed form and its answer: prompts out to the engine, deltas back.

    GenerateRequest ──start()──▶ Generation ──deltas()──▶ batches of Delta ──▶ a stream, or a whole answer

Closing a Generation, for whatever reason, aborts what still runs and gives its slot back.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import TracebackType

from ..engine.messages import AddRequest, Chunk
from ..engine.outputs import Delta, RequestStream, TextOptions
from ..engine.tokenizer import Tokenizer
from ..scheduler.params import SamplingParams
from . import errors
from .admission import Slot
from .config import ServerConfig
from .dispatcher import Dispatcher, Mailbox
from .logs import logger
from .metrics import Metrics


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the caller sent, None if it sent ids."""

    token_ids: list[int]
    params: SamplingParams
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What is generated, without a trace of the API that asked for it. Choice i*n + j is sample j of prompt i."""

    prompts: list[Prompt]
    text_options: TextOptions
    arrival: float  # time.monotonic()
    priority: int = 0
    cache_salt: str = ""


@dataclass(slots=True)
class Usage:
    """Tokens so far; a prompt counts once, however many samples are drawn from it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class _Part:
    """One prompt of the request: one engine request."""

    def __init__(self, prompt: Prompt, first_choice: int, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.prompt = prompt
        self.first_choice = first_choice
        self.computed = False  # the engine has answered: the prompt counts
        params = prompt.params
        self.stream = RequestStream(tokenizer, options, prompt.token_ids, n=params.n, min_tokens=params.min_tokens)


class Generation:
    """The samples of one request while they are drawn. A context manager: leaving it is `close`."""

    def __init__(
        self,
        request: GenerateRequest,
        *,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        metrics: Metrics,
        config: ServerConfig,
        slot: Slot,
    ) -> None:
        self.request = request
        self.usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in request.prompts))
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._config = config
        self._slot = slot
        self._mailbox = Mailbox(request.arrival, metrics)
        self._parts: dict[str, _Part] = {}
        self._first_token: dict[int, float] = {}
        self._failed = False
        first_choice = 0
        for prompt in request.prompts:
            # Made here and unrelated to any id the caller sent: nobody can guess, reuse or abort another's.
            self._parts[uuid.uuid4().hex] = _Part(prompt, first_choice, tokenizer, request.text_options)
            first_choice += prompt.params.n
        self.num_choices = first_choice
        self._ordered = list(self._parts.values())
        self._open_parts = len(self._parts)

    def start(self) -> None:
        """Hand the prompts to the engine. Raises 503 if it is gone."""
        request = self.request
        self._dispatcher.send(
            (
                AddRequest(
                    request_id=request_id,
                    prompt_ids=part.prompt.token_ids,
                    params=part.prompt.params,
                    priority=request.priority,
                    arrival=request.arrival,
                    cache_salt=request.cache_salt,
                )
                for request_id, part in self._parts.items()
            ),
            self._mailbox,
        )

    def part_of(self, choice: int) -> tuple[Prompt, RequestStream]:
        """The prompt that a choice continues, and what the engine has said about it."""
        part = self._ordered[choice // self.request.prompts[0].params.n]
        return part.prompt, part.stream

    async def deltas(self) -> AsyncGenerator[list[Delta]]:
        """All news as they come, until every sample has ended; `Delta.index` is the choice's.

        An empty batch means that nothing came for `keep_alive_interval` seconds.
        Raises ApiError when the engine fails, the request is out of time, or the server stops.
        """
        deadline = self.request.arrival + self._config.request_timeout
        try:
            while self._open_parts:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise errors.timed_out(self._config.request_timeout)
                news = await self._mailbox.take(min(left, self._config.keep_alive_interval))
                yield [self._fold(chunk) for chunk in news]
        except errors.ApiError:
            self._failed = True
            raise

    def _fold(self, chunk: Chunk) -> Delta:
        part = self._parts[chunk.request_id]
        sample = part.stream.samples[chunk.index]
        tokens_before, cached_before = sample.num_tokens, part.stream.num_cached
        delta = part.stream.fold(chunk)
        if part.stream.ended_early(delta):
            self._dispatcher.end_sample(chunk.request_id, chunk.index)
        delta.index += part.first_choice
        self._count(part, delta, sample.num_tokens - tokens_before, part.stream.num_cached - cached_before)
        if part.stream.finished and delta.finish_reason is not None:  # this chunk ended the last sample
            self._open_parts -= 1
            self._dispatcher.forget([chunk.request_id], abort=False)
        if delta.finish_reason == "error":
            logger.error("a request failed in the engine: %s", delta.error)
            raise errors.engine_failed()
        if delta.finish_reason is not None:
            now = time.monotonic()
            first = self._first_token.get(delta.index, now)
            self._metrics.sample_finished(
                delta.finish_reason, sample.num_tokens, now - self.request.arrival, now - first
            )
        return delta

    def _count(self, part: _Part, delta: Delta, drawn: int, cached: int) -> None:
        """Usage and the token counters, from the same numbers."""
        metrics = self._metrics
        if not part.computed:
            part.computed = True
            metrics.prompt_tokens.inc(len(part.prompt.token_ids))
            metrics.request_prompt_tokens.observe(len(part.prompt.token_ids))
        if drawn:
            self._first_token.setdefault(delta.index, time.monotonic())
            self.usage.completion_tokens += drawn
            metrics.generation_tokens.inc(drawn)
        if cached:
            self.usage.cached_tokens += cached
            metrics.cached_tokens.inc(cached)

    def close(self) -> None:
        """Idempotent."""
        self._slot.release()
        unfinished = self._dispatcher.forget(self._parts, abort=True)
        if unfinished and not self._failed:
            self._metrics.aborted("running" if self._mailbox.has_begun else "waiting")

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
