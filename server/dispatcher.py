"""Engine messages to the requests that wait for them: one hop to the event loop per step, one mailbox per request.

    engine thread                      event loop
    on_message(StepOutputs) ──hop──▶ for each chunk: mailbox.put() ──wakes──▶ mailbox.take()

A mailbox has a single slot per sample in which news *merge*: whoever reads slowly gets fewer, longer pieces, and what
waits for it is bounded by its own max_tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

from ..engine.client import EngineClient, News
from ..engine.errors import EngineDeadError
from ..engine.messages import (
    Abort,
    AddRequest,
    Chunk,
    EngineDead,
    EngineHung,
    EngineReady,
    Progress,
    StepOutputs,
    StepStats,
    Watch,
    add_totals,
)
from . import errors
from .life import Life
from .logs import logger
from .metrics import Metrics
from .promises import SampleClock

SampleKey = tuple[str, int]  # engine request id, sample index


class Mailbox:
    """What has arrived for one API request, whose prompts are one engine request each. Event loop only.

    keep_gaps   the clocks of its samples remember every gap between tokens
    prefill_at  when its first step began; None = it waits
    decode_at   when its first token came; None = there is none
    """

    def __init__(self, arrival: float, metrics: Metrics, *, keep_gaps: bool = False) -> None:
        self.prefill_at: float | None = None
        self.decode_at: float | None = None
        self._arrival = arrival
        self._metrics = metrics
        self._keep_gaps = keep_gaps
        self._clocks: dict[SampleKey, SampleClock] = {}
        self._over: set[SampleKey] = set()  # ended by their text; the engine may be a step ahead
        self._news: dict[SampleKey, Chunk] = {}
        self._failure: errors.ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._give_up = 0.0  # when whoever waits wants to be told that nothing came, on the loop's clock

    @property
    def open_clocks(self) -> Iterable[SampleClock]:
        """Of the samples that have been heard of and not been closed."""
        return self._clocks.values()

    def put(self, chunk: Chunk, now: float) -> None:
        """Latencies are taken here, as tokens arrive, so that a slow reader does not look like a slow engine."""
        key = (chunk.request_id, chunk.index)
        if key in self._over:
            return
        clock = self._clocks.get(key)
        if clock is None:
            clock = self._clocks[key] = SampleClock()
        clock.heard = now
        if chunk.token_ids:
            self._saw_token(clock, now)
        if chunk.queued_seconds >= 0:
            if self.prefill_at is None:
                self.prefill_at = self._arrival + chunk.queued_seconds
            self._metrics.queue_time.observe(chunk.queued_seconds)
        held = self._news.get(key)
        if held is None:
            self._news[key] = chunk
        else:
            _merge(held, chunk)
        self._wake()

    def close_sample(self, key: SampleKey, *, early: bool) -> SampleClock:
        """The sample has ended: its clock, which is forgotten here. `early`: the engine does not know of it yet."""
        if early:
            self._over.add(key)
        return self._clocks.pop(key)

    def _saw_token(self, clock: SampleClock, now: float) -> None:
        if clock.last is None:
            clock.first = now
            if self.decode_at is None:
                self.decode_at = now
            self._metrics.time_to_first_token.observe(now - self._arrival)
        else:
            self._metrics.inter_token_latency.observe(now - clock.last)
            if self._keep_gaps:
                clock.gaps.append(now - clock.last)
        clock.last = now

    def fail(self, failure: errors.ApiError) -> None:
        self._failure = failure
        self._wake()

    async def take(self, timeout: float) -> list[Chunk]:
        """All news since the last call; empty if none came within `timeout` seconds. Raises what `fail` was given."""
        if not self._news and self._failure is None:
            loop = asyncio.get_running_loop()
            self._give_up = loop.time() + timeout
            # One alarm for as long as this waits again and again: news come far more often than it would ring.
            if self._alarm is None or self._alarm.when() > self._give_up:
                self._set_alarm(loop)
            self._waiter = loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._news:  # what came before a failure is still delivered
            news = list(self._news.values())
            self._news.clear()
            return news
        if self._failure is not None:
            raise self._failure
        return []

    def close(self) -> None:
        """Nobody will wait here any more."""
        if self._alarm is not None:
            self._alarm.cancel()

    def _set_alarm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = loop.call_at(self._give_up, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._alarm = None
        if self._waiter is not None and loop.time() < self._give_up:
            self._set_alarm(loop)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(held: Chunk, chunk: Chunk) -> None:
    held.token_ids = held.token_ids + chunk.token_ids
    if chunk.logprobs:
        held.logprobs = (held.logprobs or []) + chunk.logprobs
    if chunk.prompt_logprobs:
        held.prompt_logprobs = (held.prompt_logprobs or []) + chunk.prompt_logprobs
    held.num_cached = max(held.num_cached, chunk.num_cached)
    held.num_drafted += chunk.num_drafted
    held.num_accepted += chunk.num_accepted
    held.finish_reason = chunk.finish_reason
    held.stop_reason = chunk.stop_reason
    held.error = chunk.error


class Dispatcher:
    """The one user of the engine client. `on_stats` is called with the figures of every step, and then `on_watched`
    with its message where it tells more than figures, as it does after `watch`.

    An engine that was started again counts from zero. What its predecessors counted is added here, so that every total
    only grows for whoever looks at it from this side.
    """

    def __init__(self, client: EngineClient, hang_timeout: float) -> None:
        self.on_stats: Callable[[StepStats], None] = _ignore
        self.on_watched: Callable[[StepOutputs], None] = _ignore
        self.life = Life(lambda: self._client.heartbeat_age(), hang_timeout)
        self.settled = asyncio.Event()  # the settings of the engine that starts are right
        self.stopping = False  # what fails from here on fails on purpose
        self.requests_sent = 0  # AddRequests; StepStats.requests_total says how many of them the engine has taken in
        self._client = client
        self._mailboxes: dict[str, Mailbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stats = StepStats()
        self._before: StepStats | None = None  # totals of the engines that have ended

    async def start(self) -> EngineReady:
        """Raises EngineStartError with the reason."""
        self._loop = asyncio.get_running_loop()
        self.life.begins()
        return await asyncio.to_thread(self._client.start, self._on_message)

    async def stop(self) -> None:
        self.stopping = True
        if self._loop is not None:
            await asyncio.to_thread(self._client.close)

    def send(self, requests: Iterable[AddRequest], mailbox: Mailbox) -> None:
        """Hand requests to the engine; what comes of them goes to `mailbox`. Raises 503 if the engine is gone."""
        if (refusal := self.life.refusal()) is not None:
            raise refusal
        try:
            for request in requests:
                self._mailboxes[request.request_id] = mailbox
                self._client.send(request)
                self.requests_sent += 1
        except EngineDeadError:
            raise errors.engine_dead() from None

    def forget(self, request_ids: Iterable[str], *, abort: bool) -> bool:
        """Deliver nothing more for these requests and, with `abort`, end them. False if all were forgotten before."""
        known = [request_id for request_id in request_ids if self._mailboxes.pop(request_id, None) is not None]
        if known and abort:
            try:
                self._client.send(Abort(known))
            except EngineDeadError:
                logger.debug("the engine was gone before an abort reached it")
        return bool(known)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests; the engine tells their mailbox."""
        with contextlib.suppress(EngineDeadError):  # then the mailbox learns of it
            self._client.send(Abort(list(request_ids)))

    def end_sample(self, request_id: str, index: int) -> None:
        """The text of one sample is complete; the request's others go on."""
        with contextlib.suppress(EngineDeadError):  # then the mailbox learns of it
            self._client.send(Abort([request_id], index))

    def watch(self, seconds: float) -> None:
        """For so long, have the engine tell more of its steps; one that is being started again is asked in vain."""
        with contextlib.suppress(EngineDeadError):
            self._client.send(Watch(seconds))

    def fail_all(self, failure: errors.ApiError) -> None:
        for mailbox in set(self._mailboxes.values()):
            mailbox.fail(failure)

    def _on_message(self, message: News) -> None:
        """On the client's thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: the server has stopped
                self._loop.call_soon_threadsafe(self._deliver, message)

    def _deliver(self, message: News) -> None:
        match message:
            case StepOutputs():
                self._deliver_step(message)
            case Progress():
                self.life.progresses(message)
                if message.settled:
                    self.settled.set()
            case EngineReady():
                logger.info("the engine serves again, after %.1f s", sum(message.startup_seconds.values()))
                self._count_on()
                self.life.serves()
            case EngineHung():
                logger.error("the engine has given no sign of life for %.1f s", message.seconds)
                self.life.hangs_now()
            case EngineDead():
                logger.error("the engine is gone: %s", message.reason)
                self.life.ends(message)
                self.fail_all(errors.engine_dead())

    def _count_on(self) -> None:
        """A new engine: its figures continue those of the ones before it, which have had all that was sent so far."""
        self._before = add_totals(StepStats(kv_blocks_total=self._stats.kv_blocks_total), self._stats)
        self._before.requests_total = self.requests_sent
        self._stats = self._before
        self.on_stats(self._stats)

    def _deliver_step(self, message: StepOutputs) -> None:
        now = time.monotonic()
        self._stats = message.stats if self._before is None else add_totals(message.stats, self._before)
        self.on_stats(self._stats)
        if message.batch is not None or message.holdings is not None:
            self.on_watched(message)
        for chunk in message.chunks:
            mailbox = self._mailboxes.get(chunk.request_id)
            if mailbox is not None:  # else it was forgotten a moment ago, and the abort is on its way
                mailbox.put(chunk, now)


def _ignore(news: StepStats | StepOutputs) -> None:
    pass
