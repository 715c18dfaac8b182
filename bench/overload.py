"""Does a server that is asked for more than it can do still do what it can? `quire bench overload`.

First the peak: a closed loop that keeps it full. Then Poisson arrivals at multiples of the rate that it finished, each
request leaving when it is due, whatever became of the others. What a server owes then: as many good tokens a second as
at its peak, a refusal at once for the rest, and a first token in time for those it let in.

A machine's pace drifts by more than shares differ, so all of it may be taken in turn several times: told are medians
over these rounds, and shares are of the best trial of the same round.

Client and server share the machine's processors where both run on one: what refusing costs is part of the result.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
from rich.table import Table

from ..scheduler.traces import arrival_times
from .client import COMPLETIONS, ServerError, Target, send, served_model, tokenize
from .dataset import POOL_TEXT, Ask, random_shapes, token_asks
from .metrics import Record, percentile

REFUSALS = ("HTTP 503", "HTTP 429")
PATIENCE = 600.0  # seconds for one request: longer than anything that was let in should take
RAMP = 0.2  # of a trial's time: until the queue is as full as it gets
BATCH = 64  # prompts made at once: a few milliseconds
SPREAD = 0.5  # of the lengths: requests of one length run in step, and a trial holds one burst of prompts more or less


@dataclass(frozen=True, slots=True, kw_only=True)
class OverloadConfig:
    """What to measure; names and meanings as on the command line."""

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    api_key: str | None = None
    factors: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)
    rounds: int = 1
    seconds: float = 60.0
    concurrency: int = 64
    input_len: int = 128
    output_len: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) <= 0 or not self.seconds > 0 or self.rounds < 1:
            raise ValueError(
                f"--factors {self.factors}, --seconds {self.seconds} and --rounds {self.rounds}: must be above 0"
            )


@dataclass(slots=True)
class Answered:
    """One request: what came of it, and seconds until its last byte."""

    record: Record
    seconds: float

    @property
    def refused(self) -> bool:
        return self.record.error in REFUSALS


@dataclass(frozen=True, slots=True)
class Trial:
    """factor: of the peak's request rate; None = the closed loop that found it. NaN where there was nothing."""

    factor: float | None
    rate: float
    requests: int
    completed: int
    refused: int
    errors: dict[str, int]  # what is neither: there should be nothing
    tokens_per_second: float
    ttft_p99: float
    refused_p50: float
    refused_p99: float


MEDIANS = ("rate", "tokens_per_second", "ttft_p99", "refused_p50", "refused_p99")
SUMS = ("requests", "completed", "refused")

Progress = Callable[[int, int], None]  # (trials that are over, of how many)


def run(config: OverloadConfig, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """The peak and each factor's trial. Raises ServerError when the server cannot be asked."""
    rounds = asyncio.run(_measure(config, progress))
    settings = asdict(config)
    del settings["api_key"]
    return {
        "benchmark": "overload",
        "settings": settings,
        "rounds": [[asdict(trial) for trial in trials] for trials in rounds],
        "trials": summary(rounds),
    }


def summary(rounds: Sequence[Sequence[Trial]]) -> list[dict[str, Any]]:
    """One row for each load: sums of what was counted, medians of the rest, and the share of the round's best."""
    best = [max(trial.tokens_per_second for trial in trials) for trials in rounds]
    rows = []
    for same in zip(*rounds, strict=True):
        row = {name: statistics.median(getattr(trial, name) for trial in same) for name in MEDIANS}
        row |= {name: sum(getattr(trial, name) for trial in same) for name in SUMS}
        shares = [trial.tokens_per_second / peak for trial, peak in zip(same, best, strict=True)]
        errors = sum((Counter(trial.errors) for trial in same), Counter())
        rows.append({"factor": same[0].factor, **row, "errors": errors, "share_of_peak": statistics.median(shares)})
    return rows


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        *("load", "req/s", "done", "refused", "errors", "tok/s", "of peak"),
        *("TTFT p99 ms", "refusal p50", "p99 ms"),
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in result["trials"]:
        shown.add_row(
            "closed loop" if row["factor"] is None else f"{row['factor']:g} x",
            f"{row['rate']:.1f}",
            str(row["completed"]),
            str(row["refused"]),
            ", ".join(f"{count} × {kind}" for kind, count in row["errors"].items()) or "0",
            f"{row['tokens_per_second']:.0f}",
            f"{row['share_of_peak']:.1%}",
            *(f"{1e3 * row[name]:.0f}" for name in ("ttft_p99", "refused_p50", "refused_p99")),
        )
    return shown


async def _measure(config: OverloadConfig, progress: Progress) -> list[list[Trial]]:
    base_url = config.url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    timeout, connector = aiohttp.ClientTimeout(total=PATIENCE), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        model, _ = await served_model(session, base_url, config.model)
        target = Target(base_url, COMPLETIONS, model, {"temperature": 0.0, "ignore_eos": True}, headers)
        pool = sorted(set(await tokenize(session, base_url, model, POOL_TEXT)))

        draw = random.Random(config.seed)

        def asks() -> Iterator[Ask]:
            """Without end. Lengths are the same in every trial; no prompt comes twice: its blocks would be there."""
            for batch in itertools.count(config.seed):
                shapes = random_shapes(BATCH, config.input_len, config.output_len, SPREAD, batch)
                yield from token_asks(shapes, pool, draw.getrandbits(64))

        warmed = await send(session, target, next(asks()))
        if warmed.error is not None:
            raise ServerError(f"the warm-up request failed: {warmed.error} {warmed.detail}")
        rounds = []
        for round_number in range(config.rounds):
            trials = [await _closed(session, target, asks(), config)]
            for number, factor in enumerate(config.factors, 1):
                progress(round_number * (1 + len(config.factors)) + number, config.rounds * (1 + len(config.factors)))
                rate = factor * trials[0].rate
                count = max(1, round(rate * config.seconds))
                times = arrival_times(count, rate, seed=config.seed + 1000 * round_number + number)
                prompts = list(itertools.islice(asks(), count))
                trials.append(await _open(session, target, prompts, times, factor, rate, config))
            rounds.append(trials)
    return rounds


async def _closed(session: aiohttp.ClientSession, target: Target, asks: Iterator[Ask], config: OverloadConfig) -> Trial:
    """`concurrency` requests at a time, for as long as a trial takes."""
    answers: list[Answered] = []
    start = time.perf_counter()

    async def worker() -> None:
        while time.perf_counter() < start + config.seconds:
            answers.append(await _timed(session, target, next(asks)))

    await asyncio.gather(*(worker() for _ in range(config.concurrency)))
    done = sum(answer.record.error is None for answer in answers)
    return _trial(None, done / (time.perf_counter() - start), answers, start, config)


async def _open(
    session: aiohttp.ClientSession,
    target: Target,
    asks: Sequence[Ask],
    times: Sequence[float],
    factor: float,
    rate: float,
    config: OverloadConfig,
) -> Trial:
    start = time.perf_counter()

    async def one(ask: Ask, due: float) -> Answered:
        await asyncio.sleep(due - time.perf_counter())
        return await _timed(session, target, ask)

    answers = await asyncio.gather(*(one(ask, start + at) for ask, at in zip(asks, times, strict=True)))
    return _trial(factor, rate, answers, start, config)


async def _timed(session: aiohttp.ClientSession, target: Target, ask: Ask) -> Answered:
    begun = time.perf_counter()
    record = await send(session, target, ask)
    return Answered(record, time.perf_counter() - begun)


def _trial(
    factor: float | None, rate: float, answers: Sequence[Answered], start: float, config: OverloadConfig
) -> Trial:
    """Tokens are counted from when the load has settled until it ends: what comes later is not served under it."""
    begin, end = start + RAMP * config.seconds, start + config.seconds
    done = [answer.record for answer in answers if answer.record.error is None]
    refused = [answer.seconds for answer in answers if answer.refused]
    others = Counter(a.record.error for a in answers if a.record.error is not None and not a.refused)
    return Trial(
        factor,
        rate,
        len(answers),
        len(done),
        len(refused),
        dict(others),
        sum(_tokens_between(record, begin, end) for record in done) / (end - begin),
        percentile([record.ttft for record in done], 99),
        percentile(refused, 50),
        percentile(refused, 99),
    )


def _tokens_between(record: Record, begin: float, end: float) -> float:
    """An event carries as many tokens as the others of its stream."""
    inside = sum(begin <= at < end for at in record.chunk_times)
    return record.output_tokens * inside / len(record.chunk_times) if record.chunk_times else 0.0
