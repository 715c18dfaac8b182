"""Load on a running server, closed loop (N at a time) or open loop (so many a second): `quire bench serve`.

    connect ─▶ ask list ─▶ warm up ─▶ /metrics ─▶ load ─▶ /metrics ─▶ Result

In a closed loop a slow server slows its own load down; only an open loop shows what happens when it falls behind. An
open loop's times are drawn, or those of a trace (replay.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from ..scheduler.traces import arrival_times
from .client import CHAT, COMPLETIONS, ServerError, Target, metrics_text, send, served_model, tokenize
from .counters import TokenCounts, read_counters
from .dataset import POOL_TEXT, Ask, random_shapes, read_asks, sharegpt_like_shapes, text_asks, token_asks
from .metrics import Record, Summary, summarise
from .replay import TOO_LONG, Pool, asks_of, fitting, scaled
from .timeline import Look, watch
from .trace_files import Trace, read_trace_file

NUM_PROMPTS = 100  # where nothing says how many
REPLAYED = ("trace", "time_scale", "length_scale", "too_long")  # settings that only a trace has
ABOVE_0 = (
    *("num_prompts", "concurrency", "request_rate", "burstiness", "output_len", "request_timeout"),
    *("time_scale", "length_scale"),
)
WARMUP_PROMPT = 32  # tokens, of the request in front of a replay
MADE_UP = ("random", "sharegpt-like")
UNTRACED = (  # and those that it takes the place of
    *("request_rate", "burstiness", "dataset", "output_len"),
    *("random_input_len", "random_output_len", "random_range_ratio", "random_prefix_len"),
)
COUNTER_PATIENCE = 2.0  # seconds: a server may count a request a moment after its last byte


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """What to measure; names and meanings as on the command line."""

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = COMPLETIONS
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    num_prompts: int | None = None  # None = 100, or all of a trace
    num_warmups: int = 1
    concurrency: int | None = None
    request_rate: float | None = None
    burstiness: float = 1.0
    dataset: str = "random"
    random_input_len: int = 256
    random_output_len: int = 64
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    output_len: int | None = None
    trace: str | None = None  # a file of trace_files.py: when requests leave, and how long they are
    time_scale: float = 1.0  # seconds of the replay for one of the trace
    length_scale: float = 1.0
    too_long: str = "refuse"  # what is made of a trace's requests that the context does not hold, or "skip"
    ignore_eos: bool | None = None  # None = yes for made-up prompts, no for a file's
    temperature: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)
    request_timeout: float = 600.0
    goodput: dict[str, float] = field(default_factory=dict)
    percentiles: tuple[float, ...] = (50, 90, 95, 99)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ABOVE_0:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be a number above 0")
        defaults = {field.name: field.default for field in fields(self)}
        for name in REPLAYED if self.trace is None else UNTRACED:
            if getattr(self, name) != defaults[name]:
                why = "needs a --trace" if self.trace is None else f"and --trace {self.trace} exclude each other"
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} {why}")
        if self.too_long not in TOO_LONG:
            raise ValueError(f"--too-long {self.too_long}: choose {' or '.join(TOO_LONG)}")
        if not isinstance(self.extra_body, dict):
            raise ValueError(f"--extra-body {self.extra_body!r}: must be a JSON object")
        if self.endpoint not in (COMPLETIONS, CHAT):
            raise ValueError(f"--endpoint {self.endpoint}: choose {COMPLETIONS} or {CHAT}")
        if not all(0 <= q <= 100 for q in self.percentiles):
            raise ValueError(f"--metric-percentiles {self.percentiles}: each lies between 0 and 100")

    @property
    def made_up(self) -> bool:
        return self.dataset in MADE_UP


@dataclass(frozen=True, slots=True)
class Load:
    """What will be asked. times: when each is due, in seconds; None = when another has ended (a closed loop).

    left_out: how many of a trace's requests are not among them, by why
    """

    warmups: list[Ask]
    asks: list[Ask]
    times: list[float] | None
    ignore_eos: bool
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    model: str
    config: LoadConfig
    summary: Summary
    records: list[Record]
    client_tokens: TokenCounts
    server_tokens: TokenCounts | None  # growth of the server's counters meanwhile; None = it shows none
    version: dict[str, Any] | None = None  # what the server says at /version; None = nothing
    left_out: dict[str, int] = field(default_factory=dict)  # of a trace: how many requests, by why
    looks: list[Look] = field(default_factory=list)

    @property
    def details(self) -> dict[str, str]:
        """One example for each kind of error."""
        return {record.error: record.detail for record in reversed(self.records) if record.error is not None}


Progress = Callable[[int, int], None]  # (requests that are over, of how many)


async def run(
    config: LoadConfig, progress: Progress = lambda done, total: None, looks: list[Look] | None = None
) -> Result:
    """Measure one load. Raises ServerError (no server, no such model) and ValueError (a setting that cannot be).

    looks: takes what the server had in hand meanwhile; None = nobody looks.
    """
    trace = None if config.trace is None else read_trace_file(Path(config.trace))
    base_url = config.base_url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    timeout = aiohttp.ClientTimeout(total=config.request_timeout)
    connector = aiohttp.TCPConnector(limit=0)  # the load is limited by its own rule, not by the connection pool
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        model, context = await served_model(session, base_url, config.model)
        if trace is None:
            load = await _load(session, base_url, model, context, config)
        else:
            load = await _replay(session, base_url, model, context, config, trace)
        target = Target(base_url, config.endpoint, model, _extra_body(config, load), headers)
        for ask in load.warmups:
            warmed = await send(session, target, ask)
            if warmed.error is not None:
                raise ServerError(f"the warm-up request failed: {warmed.error} {warmed.detail}")
        before = await _counters(session, base_url)
        version = await _version(session, base_url)
        ask_metrics = partial(metrics_text, session, base_url)
        watching = None if looks is None else asyncio.create_task(watch(ask_metrics, looks))
        records = await _play(session, target, load, config.concurrency, progress)
        if watching is not None:
            watching.cancel()
        client = TokenCounts(sum(r.prompt_tokens for r in records), sum(r.output_tokens for r in records))
        server = None if before is None else await _settled_growth(session, base_url, before, client)
    duration = max(record.last for record in records) - min(record.sent for record in records)
    summary = summarise(records, duration, config.goodput, config.percentiles)
    return Result(model, config, summary, records, client, server, version, load.left_out, looks or [])


def _extra_body(config: LoadConfig, load: Load) -> dict[str, Any]:
    ignore_eos = load.ignore_eos if config.ignore_eos is None else config.ignore_eos
    return {"temperature": config.temperature, **({"ignore_eos": True} if ignore_eos else {}), **config.extra_body}


async def _load(
    session: aiohttp.ClientSession, base_url: str, model: str, context: int | None, config: LoadConfig
) -> Load:
    """Other prompts for the warm-up than for the load, so that it does not fill the prefix cache for it."""
    wanted = config.num_prompts or NUM_PROMPTS
    asks = await _asks(session, base_url, model, context, config, config.num_warmups + wanted)
    times = None
    if config.request_rate is not None:
        times = arrival_times(wanted, config.request_rate, config.burstiness, config.seed)
    return Load(asks[: config.num_warmups], asks[config.num_warmups :], times, config.made_up)


async def _replay(
    session: aiohttp.ClientSession, base_url: str, model: str, context: int | None, config: LoadConfig, trace: Trace
) -> Load:
    trace = scaled(trace, config.time_scale, config.length_scale, config.num_prompts)
    trace = fitting(trace, context, config.too_long, config.length_scale)
    ids = await tokenize(session, base_url, model, POOL_TEXT)
    words = POOL_TEXT.split()
    pool = Pool(words, len(ids) / len(words)) if config.endpoint == CHAT else Pool(sorted(set(ids)))
    warmup = pool.ask(pool.items[:WARMUP_PROMPT], 1)
    return Load(
        [warmup] * config.num_warmups,
        asks_of(trace, pool, config.seed, config.length_scale),
        [row.time for row in trace.requests],
        ignore_eos=all(row.ask is None for row in trace.requests),
        left_out=trace.left_out,
    )


async def _asks(
    session: aiohttp.ClientSession, base_url: str, model: str, context: int | None, config: LoadConfig, count: int
) -> list[Ask]:
    if not config.made_up:
        asks = read_asks(Path(config.dataset), count, config.output_len, config.seed)
        return [await _with_length(session, base_url, model, ask) for ask in asks]
    if config.dataset == "random":
        lengths = config.random_input_len, config.random_output_len, config.random_range_ratio
        shapes = random_shapes(count, *lengths, config.seed)
    elif context is None:
        raise ServerError("/v1/models tells no max_model_len, which --dataset sharegpt-like is scaled by")
    else:
        shapes = sharegpt_like_shapes(count, context, config.seed)
    if config.output_len is not None:
        shapes = [replace(shape, output_len=config.output_len) for shape in shapes]
    pool = await tokenize(session, base_url, model, POOL_TEXT)
    if config.endpoint == CHAT:
        return text_asks(shapes, len(pool) / len(POOL_TEXT.split()), config.seed, config.random_prefix_len)
    return token_asks(shapes, sorted(set(pool)), config.seed, config.random_prefix_len)


async def _with_length(session: aiohttp.ClientSession, base_url: str, model: str, ask: Ask) -> Ask:
    if ask.output_len is not None:
        return ask
    if ask.answer is None:
        raise ValueError("the dataset has rows without max_tokens: give them one, or pass --output-len")
    return replace(ask, output_len=max(1, len(await tokenize(session, base_url, model, ask.answer))))


async def _play(
    session: aiohttp.ClientSession, target: Target, load: Load, concurrency: int | None, progress: Progress
) -> list[Record]:
    """Records in the order of the asks."""
    records: list[Record | None] = [None] * len(load.asks)

    over = itertools.count(1)

    async def one(index: int, due: float | None) -> None:
        records[index] = await send(session, target, load.asks[index], due)
        progress(next(over), len(records))

    if load.times is None:
        await _closed_loop(one, len(records), concurrency or len(records))
    else:
        await _open_loop(one, load.times, concurrency)
    return [record for record in records if record is not None]


One = Callable[[int, float | None], Any]


async def _closed_loop(one: One, count: int, concurrency: int) -> None:
    indices = iter(range(count))

    async def worker() -> None:
        for index in indices:  # one iterator for all workers: each takes the next
            await one(index, None)

    await asyncio.gather(*(worker() for _ in range(min(concurrency, count))))


async def _open_loop(one: One, times: Iterable[float], concurrency: int | None) -> None:
    """Requests leave when they are due; `concurrency` holds them back, and what it costs shows as lateness."""
    gate = asyncio.Semaphore(concurrency or 1 << 30)
    start = time.perf_counter()

    async def at(index: int, due: float) -> None:
        async with gate:
            await one(index, due)

    async with asyncio.TaskGroup() as group:
        for index, offset in enumerate(times):
            await asyncio.sleep(start + offset - time.perf_counter())
            group.create_task(at(index, start + offset))


async def _version(session: aiohttp.ClientSession, base_url: str) -> dict[str, Any] | None:
    """What the server made of its settings, where it tells."""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
        async with session.get(base_url + "/version") as response:
            if response.status == 200:
                return dict(await response.json())
    return None


async def _counters(session: aiohttp.ClientSession, base_url: str) -> TokenCounts | None:
    text = await metrics_text(session, base_url)
    return None if text is None else read_counters(text)


async def _settled_growth(
    session: aiohttp.ClientSession, base_url: str, before: TokenCounts, expected: TokenCounts
) -> TokenCounts | None:
    deadline = time.perf_counter() + COUNTER_PATIENCE
    while (after := await _counters(session, base_url)) is not None:
        if after - before == expected or time.perf_counter() > deadline:
            return after - before
        await asyncio.sleep(0.1)
    return None
