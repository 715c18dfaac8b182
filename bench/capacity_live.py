"""Trials of a capacity search against a running server, over HTTP, in an open loop.

The time between tokens is the gap between a stream's events that carry text: two tokens in one event are one gap. The
scheduling delay is the server's own: how `…_request_queue_time_seconds` at /metrics grew during the trial, linear
within a bucket. A server without that histogram is judged by the time to first token, an upper bound that includes the
prompt.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from itertools import chain

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from ..scheduler.traces import at_rate
from .capacity import MAX_DELAY, TBT_PERCENTILE, CapacityConfig, Trial, unit_trace
from .client import COMPLETIONS, ServerError, Target, metrics_text, send, served_model, tokenize
from .dataset import POOL_TEXT, Ask, Shape, token_asks
from .metrics import Record, percentile

QUEUE_TIMES = ("quire_request_queue_time_seconds", "vllm:request_queue_time_seconds")
FROM_METRICS = "first step, by the server's queue time histogram"
FROM_TTFT = "first token (the server tells no queue times)"

Buckets = Mapping[float, float]  # upper bound in seconds -> how many were at most that


class LiveServer:
    """One server; `trial` makes it a `Trial` of a load at some rate.

    delay_from: how the last trial knew of scheduling delays.
    """

    def __init__(self, config: CapacityConfig) -> None:
        self.config = config
        self.delay_from = FROM_TTFT
        self._base_url = (config.url or "").rstrip("/").removesuffix("/v1")
        self._tried = 0

    def trial(self, rate: float) -> Trial:
        """As many requests as the configuration says, at `rate` a second, the same lengths and gaps in every trial.

        Raises ServerError when there is no such server or model, ValueError when the trace does not fit its context.
        """
        # Other tokens in each trial: the prefix cache would know them.
        self._tried += 1
        return asyncio.run(self._trial(rate))

    async def _trial(self, rate: float) -> Trial:
        config = self.config
        headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        # Who has no answer when twice the trial's time is over, is behind by more than any objective allows.
        timeout = aiohttp.ClientTimeout(total=2 * config.max_trial_seconds)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
            model, context = await served_model(session, self._base_url, config.model)
            target = Target(self._base_url, COMPLETIONS, model, {"temperature": 0.0, "ignore_eos": True}, headers)
            asks, times = await self._load(session, model, context, rate)
            warmed = await send(session, target, asks[-1])
            if warmed.error is not None:
                raise ServerError(f"the warm-up request failed: {warmed.error} {warmed.detail}")
            before = await _queue_times(session, self._base_url)
            records = await open_loop(session, target, asks[:-1], times)
            after = await _queue_times(session, self._base_url)
        self.delay_from = FROM_TTFT if after is None else FROM_METRICS
        return judge(records, rate, config.slo_seconds(None), None if after is None else grown(before or {}, after))

    async def _load(
        self, session: aiohttp.ClientSession, model: str, context: int | None, rate: float
    ) -> tuple[list[Ask], list[float]]:
        """(what to ask, one more for the warm-up; when)."""
        if context is None:
            raise ServerError(f"{self._base_url}/v1/models tells no max_model_len, which --trace is scaled by")
        arrivals = at_rate(unit_trace(self.config, context), rate)
        arrivals = [arrival for arrival in arrivals if arrival.time <= self.config.max_trial_seconds]
        shapes = [Shape(arrival.prompt_len, arrival.output_len) for arrival in arrivals]
        pool = await tokenize(session, self._base_url, model, POOL_TEXT)
        seed = self.config.seed * 1_000_003 + self._tried
        return token_asks([*shapes, shapes[0]], sorted(set(pool)), seed), [arrival.time for arrival in arrivals]


async def open_loop(
    session: aiohttp.ClientSession, target: Target, asks: Sequence[Ask], times: Sequence[float]
) -> list[Record]:
    """Each request leaves when it is due, whatever became of the others; records in the order of the asks."""
    start = time.perf_counter()

    async def one(ask: Ask, due: float) -> Record:
        await asyncio.sleep(due - time.perf_counter())
        return await send(session, target, ask, due)

    return list(await asyncio.gather(*(one(ask, start + at) for ask, at in zip(asks, times, strict=True))))


def judge(records: Sequence[Record], rate: float, slo: float, queued: Buckets | None) -> Trial:
    """A trial with a failed request has not passed. queued: of the server's own histogram, None where it has none."""
    done = [record for record in records if record.error is None]
    gaps = sorted(chain.from_iterable(record.itls for record in done))
    ttfts = [record.ttft for record in done]
    tbt = percentile(gaps, TBT_PERCENTILE)
    ttft_p50, ttft_p99 = percentile(ttfts, 50), percentile(ttfts, 99)
    delay_p50, delay_p99 = (ttft_p50, ttft_p99) if queued is None else (quantile(queued, 50), quantile(queued, 99))
    passed = len(done) == len(records) and (not gaps or tbt <= slo) and delay_p50 <= MAX_DELAY
    return Trial(
        rate,
        passed,
        len(records),
        tbt_p50=percentile(gaps, 50),
        tbt_p99=tbt,
        delay_p50=delay_p50,
        delay_p99=delay_p99,
        ttft_p50=ttft_p50,
        ttft_p99=ttft_p99,
    )


# ---------------------------------------------------------------- the server's histogram


async def _queue_times(session: aiohttp.ClientSession, base_url: str) -> Buckets | None:
    text = await metrics_text(session, base_url)
    return None if text is None else read_queue_times(text)


def read_queue_times(exposition: str) -> Buckets | None:
    """Cumulative buckets of a Prometheus text, summed over labels; None when it has no such histogram."""
    found: dict[str, dict[float, float]] = {}
    for family in text_string_to_metric_families(exposition):
        if family.name in QUEUE_TIMES:
            buckets = found.setdefault(family.name, {})
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    bound = float(sample.labels["le"])
                    buckets[bound] = buckets.get(bound, 0.0) + sample.value
    return next((found[name] for name in QUEUE_TIMES if found.get(name)), None)


def grown(before: Buckets, after: Buckets) -> dict[float, float]:
    return {bound: count - before.get(bound, 0.0) for bound, count in after.items()}


def quantile(buckets: Buckets, q: float) -> float:
    """The q-th percentile (0..100) of cumulative buckets, linear within one; inf above the last, NaN of nothing."""
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return math.nan
    wanted, below, low = buckets[bounds[-1]] * q / 100, 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted and buckets[bound] > below:
            return bound if math.isinf(bound) else low + (bound - low) * (wanted - below) / (buckets[bound] - below)
        below, low = buckets[bound], bound
    return math.inf
