"""One API request between its parsed form and its answer: prompts out to the engine, deltas back.

    GenerateRequest ──start()──▶ Generation ──deltas()──▶ batches of Delta ──▶ a stream, or a whole answer

Closing a Generation, for whatever reason, aborts what still runs and gives its slot back.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from types import TracebackType

from ..engine.messages import AddRequest, Chunk, Slo, Speculative
from ..engine.outputs import Delta, RequestStream, TextOptions
from ..engine.tokenizer import Tokenizer
from ..scheduler.params import SamplingParams
from . import errors, logs
from .admission import Slot
from .config import ServerConfig
from .cost import Encoded, Experience
from .dispatcher import Dispatcher, Mailbox
from .logs import logger
from .metrics import Metrics
from .pacing import paced
from .parsing.reading import AnswerFormat
from .promises import SampleClock, verdict
from .quotas import Lease
from .registry import Name, Registry

# How a sample ends by itself, before max_tokens: that is what tells how long samples are. A limit tells its own length.
OWN_ENDS = ("stop", "repetition")
# The engine ends what is out of time. One that does not answer is given this much longer before its caller is told.
WALL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the caller sent, None if it sent ids or not all of it was kept."""

    token_ids: list[int]
    params: SamplingParams
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What is generated, without a trace of the API that asked for it. Choice i*n + j is sample j of prompt i.

    format   how the text of an answer is to be read
    interval tokens of a sample that come together in a stream
    timeout  the request's own limit in seconds from arrival; the server's holds where that is shorter
    encoded  the text that the prompts were made of
    unbound  max_tokens was left out: samples are as long as they would be
    """

    prompts: list[Prompt]
    text_options: TextOptions
    arrival: float  # time.monotonic()
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    weight: float | None = None  # of the tenant; None = as the engine was started
    slo: Slo = field(default_factory=Slo)
    timeout: float | None = None
    speculative: Speculative = field(default_factory=Speculative)
    format: AnswerFormat = field(default_factory=AnswerFormat)
    interval: int = 1
    encoded: Encoded = field(default_factory=Encoded)
    unbound: bool = False


@dataclass(slots=True)
class Usage:
    """Tokens so far; a prompt counts once, however many samples are drawn from it.

    reasoning_tokens of the completion tokens, those of thinking; told by who reads it, None = nobody does
    drafted_tokens   guessed ahead and verified. How many is a matter of the moment, unlike which tokens are drawn
    accepted_tokens  of these, those among the completion tokens
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    reasoning_tokens: int | None = None


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
        name: Name,
        registry: Registry,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        metrics: Metrics,
        experience: Experience,
        config: ServerConfig,
        slot: Slot,
        lease: Lease,
    ) -> None:
        self.request = request
        self._name = name
        self._registry = registry
        self.usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in request.prompts))
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._experience = experience
        self._config = config
        self._slot = slot
        self._lease = lease
        self._timeout = min(config.request_timeout, request.timeout or config.request_timeout)
        self._mailbox = Mailbox(request.arrival, metrics, keep_gaps=request.slo.itl is not None)
        self._parts: dict[str, _Part] = {}
        self._drawn: dict[int, int] = {}  # choice -> its tokens so far, while it is open
        self.finish_reasons: list[str] = []  # the engine's, as samples end
        self._own_lengths: list[int] = []  # tokens of samples that nothing cut short
        self._failure: errors.ApiError | None = None
        self._expired: str | None = None  # which limit, as in Chunk.error
        first_choice = 0
        for prompt in request.prompts:
            # Made here and unrelated to any id the caller sent: nobody can guess, reuse or abort another's.
            self._parts[uuid.uuid4().hex] = _Part(prompt, first_choice, tokenizer, request.text_options)
            first_choice += prompt.params.n
        self._ordered = list(self._parts.values())
        self._open_parts = len(self._parts)
        self._open_samples = first_choice
        registry.enter(name, self)

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
                    tenant=request.tenant,
                    weight=request.weight,
                    slo=request.slo,
                    timeout=self._timeout,
                    speculative=request.speculative,
                )
                for request_id, part in self._parts.items()
            ),
            self._mailbox,
        )
        self._slot.sent(self._dispatcher.requests_sent)

    @property
    def label(self) -> str:
        """What its caller calls it."""
        return self._name[1]

    @property
    def prefill_at(self) -> float | None:
        """When its first step began, on the clock of `arrival`."""
        return self._mailbox.prefill_at

    @property
    def decode_at(self) -> float | None:
        """When its first token came."""
        return self._mailbox.decode_at

    @property
    def error_code(self) -> str | None:
        return None if self._failure is None else self._failure.code

    def part_of(self, choice: int) -> tuple[Prompt, RequestStream]:
        """The prompt that a choice continues, and what the engine has said about it."""
        part = self._ordered[choice // self.request.prompts[0].params.n]
        return part.prompt, part.stream

    def deltas(self) -> AsyncGenerator[list[Delta]]:
        """As `news`, at the pace that was asked for."""
        interval = self.request.interval
        return self.news() if interval == 1 else paced(self.news(), interval)

    async def news(self) -> AsyncGenerator[list[Delta]]:
        """All news as they come, until every sample has ended; `Delta.index` is the choice's.

        An empty batch means that nothing came for `keep_alive_interval` seconds.
        Raises ApiError when the engine fails, the request is out of time, or the server stops; what came before has
        been yielded then.
        """
        wall = self.request.arrival + self._timeout + WALL_SECONDS
        while self._open_parts:
            left = max(0.0, wall - time.monotonic())
            try:
                news = await self._mailbox.take(min(left, self._config.keep_alive_interval))
            except errors.ApiError as failure:
                self._failure = failure
                raise
            if news or time.monotonic() < wall:
                yield self._fold_all(news)
            else:
                self._expired = "timeout"
            if self._expired is not None:
                self._break_promises()
                self._metrics.expired(self._expired)
                self._failure = self._out_of_time(self._expired)
            if self._failure is not None:
                raise self._failure

    def _fold_all(self, news: list[Chunk]) -> list[Delta]:
        """Raises the 500 that ends this request, and says so in its stream, when what it drew cannot become text."""
        try:
            return [self._fold(chunk) for chunk in news]
        except Exception as error:
            logger.error("what a request drew cannot become text: %s", logs.where(error))
            self._failure = errors.internal()
            raise self._failure from None

    def _fold(self, chunk: Chunk) -> Delta:
        part = self._parts[chunk.request_id]
        cached_before = part.stream.num_cached
        delta = part.stream.fold(chunk)
        early = part.stream.ended_early(delta)
        delta.index += part.first_choice
        unbegun = chunk.finish_reason in ("error", "expired") and chunk.num_cached < 0 and not chunk.token_ids
        self._count(part, delta, part.stream.num_cached - cached_before, unbegun=unbegun)
        if early:
            self._dispatcher.end_sample(chunk.request_id, chunk.index)
        if delta.finish_reason is not None:
            clock = self._mailbox.close_sample((chunk.request_id, chunk.index), early=early)
            if part.stream.finished:
                self._open_parts -= 1
                self._dispatcher.forget([chunk.request_id], abort=False)
            self._end_sample(part, delta, clock)
        return delta

    def _count(self, part: _Part, delta: Delta, cached: int, *, unbegun: bool) -> None:
        """Usage and the token counters, from the same numbers. A prompt that ended in the queue counts for nothing."""
        metrics = self._metrics
        if not part.computed and not unbegun:
            part.computed = True
            self._slot.prompt_computed(len(part.prompt.token_ids) / self.usage.prompt_tokens)
            metrics.prompt_tokens.inc(len(part.prompt.token_ids))
            metrics.request_prompt_tokens.observe(len(part.prompt.token_ids))
        if delta.num_drawn:
            self._drawn[delta.index] = self._drawn.get(delta.index, 0) + delta.num_drawn
            self.usage.completion_tokens += delta.num_drawn
            metrics.generation_tokens.inc(delta.num_drawn)
        self.usage.drafted_tokens += delta.num_drafted
        self.usage.accepted_tokens += delta.num_accepted
        if cached:
            self.usage.cached_tokens += cached
            metrics.cached_tokens.inc(cached)

    def _end_sample(self, part: _Part, delta: Delta, clock: SampleClock) -> None:
        """Its last accounts. One that failed or ran out of time ends the whole request, after this batch of news."""
        tokens = self._drawn.pop(delta.index, 0)
        self._open_samples -= 1
        self._slot.sample_ended()
        if delta.finish_reason in ("error", "expired"):
            if delta.finish_reason == "expired":
                self._judge(clock, finished=False)
                self._expired = self._expired or delta.error or "timeout"
            elif self._failure is None:
                logger.error("a request failed in the engine: %s", delta.error)
                self._failure = errors.engine_failed()
            delta.finish_reason = None  # the error says it
            return
        self.finish_reasons.append(delta.finish_reason or "")
        self._judge(clock, finished=True)
        if self._ended_by_itself(delta.finish_reason, tokens, part.prompt.params.max_tokens):
            self._own_lengths.append(tokens)
        heard = self.request.arrival if clock.heard is None else clock.heard
        self._metrics.sample_finished(
            delta.finish_reason or "",
            tokens=tokens,
            total_seconds=heard - self.request.arrival,
            decode_seconds=0.0 if clock.first is None else heard - clock.first,
            ideal_seconds=self._experience.ideal_seconds(len(part.prompt.token_ids), tokens),
        )

    def _ended_by_itself(self, finish_reason: str | None, tokens: int, max_tokens: int) -> bool:
        if self.request.unbound:
            return finish_reason != "abort"
        return finish_reason in OWN_ENDS and tokens < max_tokens

    def _out_of_time(self, reason: str) -> errors.ApiError:
        if reason != "timeout":
            limit = f"`slo.deadline_ms` = {1e3 * (self.request.slo.deadline or 0.0):g}"
        elif self._timeout == self.request.timeout:
            limit = f"`timeout` = {self._timeout:g} s"
        else:
            limit = f"This server's limit of {self._timeout:g} s for a request"
        return errors.out_of_time(reason, limit, self.usage.completion_tokens)

    def _break_promises(self) -> None:
        """Of the samples that nobody will hear of any more: those that have begun, and those that never will."""
        clocks = list(self._mailbox.open_clocks)
        for clock in clocks:
            self._judge(clock, finished=False)
        self._judge(SampleClock(), finished=False, count=self._open_samples - len(clocks))

    def _judge(self, clock: SampleClock, *, finished: bool, count: int = 1) -> None:
        for promise, kept in verdict(self.request.slo, self.request.arrival, clock, finished=finished).items():
            self._metrics.promise(promise, kept, self.request.tenant, count)

    def abort(self) -> None:
        """End its samples where they are; their last news, which are still to come, say so."""
        self._metrics.aborted("waiting" if self._mailbox.decode_at is None else "running")
        self._dispatcher.abort(self._parts)

    def close(self) -> None:
        """Idempotent."""
        self._registry.leave(self._name, self)
        self._mailbox.close()
        self._slot.release()
        if self._own_lengths:
            self._experience.saw_samples(sum(self._own_lengths) / len(self._own_lengths))
            self._own_lengths = []
        prompt_tokens = sum(len(part.prompt.token_ids) for part in self._ordered if part.computed)
        if self._lease.settle(prompt_tokens + self.usage.completion_tokens):
            self._metrics.tenant_used(
                self.request.tenant, prompt_tokens, self.usage.cached_tokens, self.usage.completion_tokens
            )
        unfinished = self._dispatcher.forget(self._parts, abort=True)
        if unfinished and self._failure is None:
            self._metrics.aborted("waiting" if self._mailbox.decode_at is None else "running")

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
