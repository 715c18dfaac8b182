"""What a load test measures, as plain functions over records; the names are those of `vllm bench serve`.

    sent ──────── first ──┬──┬─── … ──┬ last
         TTFT             ITL ITL … ITL           E2E = last - sent
                          TPOT = (last - first) / (output tokens - 1)

Times are seconds of one monotonic clock; reports are in milliseconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LATENCIES = ("ttft", "tpot", "itl", "e2el")


@dataclass(slots=True)
class Record:
    """One request as its client saw it.

    due               when the schedule wanted it sent; `sent - due` is the load generator's own lateness
    chunk_times       arrival of every event that carried text
    prompt_tokens, output_tokens, cached_tokens   from the response's usage, never guessed
    error, detail     kind of failure in a few words (None = success), and what the server said about this one
    """

    due: float = 0.0
    sent: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    last: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    detail: str = ""

    @property
    def e2el(self) -> float:
        return self.last - self.sent

    @property
    def ttft(self) -> float:
        """Until the first text; a request whose tokens show no text (special ones only) is first seen when it ends."""
        return (self.chunk_times[0] if self.chunk_times else self.last) - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time of an output token after the first; None when there is no second."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls(self) -> list[float]:
        """Gaps between events. A server that sends two tokens in one event gives one gap for both."""
        return [after - before for before, after in pairwise(self.chunk_times)]


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between neighbours as numpy's default; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, deviation (of the sample itself, n in the denominator) and percentiles, in the unit of the values."""

    count: int
    mean: float
    median: float
    std: float
    percentiles: dict[str, float]


def describe(values: Sequence[float], points: Sequence[float]) -> Distribution:
    mean = math.fsum(values) / len(values) if values else math.nan
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)) if values else math.nan
    return Distribution(
        len(values), mean, percentile(values, 50), std, {f"p{q:g}": percentile(values, q) for q in points}
    )


def parse_goodput(limits: Iterable[str]) -> dict[str, float]:
    """["ttft:500", "tpot:50"] (milliseconds) -> {"ttft": 0.5, "tpot": 0.05}. Raises ValueError naming the bad part."""
    parsed = {}
    for limit in limits:
        name, _, text = limit.partition(":")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if name not in ("ttft", "tpot", "e2el") or not value > 0:
            raise ValueError(f"--goodput {limit!r}: write NAME:MILLISECONDS with NAME one of ttft, tpot, e2el")
        parsed[name] = value / 1000
    return parsed


def is_good(record: Record, limits: Mapping[str, float]) -> bool:
    """The request succeeded within every limit (DistServe, arXiv 2401.09670). Without a second token TPOT is met."""
    seen = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2el}
    return record.error is None and all(seen[name] <= limit for name, limit in limits.items())


@dataclass(frozen=True, slots=True)
class Summary:
    duration: float  # seconds from the first request sent to the last answer complete
    completed: int
    errors: dict[str, int]  # kind -> how many
    prompt_tokens: int  # of completed requests
    output_tokens: int
    cached_tokens: int
    request_throughput: float  # completed requests / s
    output_throughput: float  # output tokens / s
    total_token_throughput: float  # prompt and output tokens / s
    goodput: float | None  # good requests / s, None without limits
    max_lateness: float  # seconds; a large one means that this client, not the server, was the bottleneck
    latencies: dict[str, Distribution]  # "ttft", "tpot", "itl", "e2el" in milliseconds


def summarise(
    records: Sequence[Record],
    duration: float,
    limits: Mapping[str, float] | None = None,
    points: Sequence[float] = (50, 90, 95, 99),
) -> Summary:
    done = [record for record in records if record.error is None]
    samples = {
        "ttft": [record.ttft for record in done],
        "tpot": [record.tpot for record in done if record.tpot is not None],
        "itl": [gap for record in done for gap in record.itls],
        "e2el": [record.e2el for record in done],
    }
    prompt = sum(record.prompt_tokens for record in done)
    output = sum(record.output_tokens for record in done)

    def per_second(amount: int) -> float:
        return amount / duration if duration > 0 else 0.0

    return Summary(
        duration=duration,
        completed=len(done),
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=sum(record.cached_tokens for record in done),
        request_throughput=per_second(len(done)),
        output_throughput=per_second(output),
        total_token_throughput=per_second(prompt + output),
        goodput=per_second(sum(is_good(record, limits) for record in records)) if limits else None,
        max_lateness=max((record.sent - record.due for record in records), default=0.0),
        latencies={name: describe([1000 * value for value in samples[name]], points) for name in LATENCIES},
    )
