"""Two results of `quire bench serve` side by side: `quire bench compare A.json B.json`.

Only what was asked the same of the same model on the same machine can be compared: anything else is refused by name,
or named with --across. Where both were asked the very same requests, request i of A stands beside request i of B, and
the bootstrap draws such pairs; else it draws from each on its own.

The interval says how far the ratio depends on which requests were asked. It does not know what else the machine did in
those minutes: repeat both in turn, and believe what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from .plots import Json, load_name, loads_of

RESAMPLES = 2000
CONFIDENCE = 95.0  # per cent

# Settings that say where or how it was looked at, and not what was asked.
ASIDE = frozenset({"base_url", "api_key", "goodput", "percentiles", "request_timeout"})
# What decides which requests there are: equal means the same ones in the same order.
REQUESTS = frozenset(
    {
        *("model", "endpoint", "num_prompts", "num_warmups", "dataset", "trace", "length_scale", "too_long", "seed"),
        *("random_input_len", "random_output_len", "random_range_ratio", "random_prefix_len", "output_len"),
    }
)
MEASURES = {
    "TTFT": ("ttft_ms", (("median", 50.0), ("p90", 90.0), ("p99", 99.0))),
    "TPOT": ("tpot_ms", (("median", 50.0), ("p99", 99.0))),
    "E2E": ("e2el_ms", (("median", 50.0), ("p99", 99.0))),
}
GOODPUT = "request_goodput"  # a rate to compare only under the same limits
RATES = {
    "requests/s": "request_throughput",
    "good requests/s": GOODPUT,
    "output tokens/s": "output_throughput",
}

Values = NDArray[np.float64]


class NotComparableError(ValueError):
    """What differs, and how to compare all the same."""


@dataclass(frozen=True, slots=True)
class Row:
    """a, b: in ms, or per second. low, high: of b / a; None where a single number cannot tell."""

    name: str
    a: float
    b: float
    difference: float | None = None  # median of B - A over pairs of requests
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float:
        return self.b / self.a if self.a else float("nan")

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return ""
        return "lower" if self.high < 1 else "higher" if self.low > 1 else "no difference seen"


@dataclass(frozen=True, slots=True)
class Compared:
    """One load of both. pairs: requests that succeeded in both; None = they were not the same requests."""

    name: str
    rows: list[Row]
    pairs: int | None
    failed: tuple[int, int]


def differences(a: Json, b: Json) -> dict[str, tuple[Any, Any]]:
    """What keeps two loads from being compared, by name: (in A, in B)."""
    facts = {
        "model_id": (a["model_id"], b["model_id"]),
        "client_machine": tuple(f"{x['client_machine']['system']}, {x['client_machine']['cpus']} cpus" for x in (a, b)),
        "host": tuple(urlsplit(x["settings"]["base_url"]).hostname for x in (a, b)),
    }
    for name in sorted(a["settings"].keys() | b["settings"].keys()):
        if name not in ASIDE:
            facts[name] = (a["settings"].get(name), b["settings"].get(name))
    return {name: (one, other) for name, (one, other) in facts.items() if one != other}


def server_differences(a: Json, b: Json) -> dict[str, tuple[Any, Any]]:
    """What the two servers were, as far as they say: usually what is to be compared."""
    one, other = a.get("server") or {}, b.get("server") or {}
    measured = ("step_cost", "startup_seconds", "memory_bytes", "reasons")  # of a start, never twice the same
    return {
        name: (one.get(name), other.get(name))
        for name in sorted(one.keys() | other.keys())
        if name not in measured and one.get(name) != other.get(name)
    }


def compare(a: Json, b: Json, across: Sequence[str] = (), seed: int = 0) -> list[Compared]:
    """B against A, load by load. across: names of `differences` that may differ. Raises NotComparableError."""
    for name, result in (("A", a), ("B", b)):
        if result.get("benchmark") != "serve":
            raise NotComparableError(
                f"{name} is no result of quire bench serve with its requests: write one with quire bench serve --json"
            )
    one, other = loads_of(a), loads_of(b)
    if len(one) != len(other):
        raise NotComparableError(f"A has {len(one)} loads, B {len(other)}: give results of the same --request-rate")
    return [_compare(x, y, across, seed) for x, y in zip(one, other, strict=True)]


def _compare(a: Json, b: Json, across: Sequence[str], seed: int) -> Compared:
    found = differences(a, b)
    if unknown := set(across) - {"model_id", "client_machine", "host", *a["settings"], *b["settings"]}:
        raise NotComparableError(f"--across {min(unknown)}: a result has no such setting")
    if barred := {name: values for name, values in found.items() if name not in across}:
        told = "; ".join(f"{name} is {one!r} in A, {other!r} in B" for name, (one, other) in barred.items())
        remedy = " ".join(f"--across {name}" for name in barred)
        raise NotComparableError(f"not comparable: {told}. If that is what you compare, say {remedy}")
    paired = not found.keys() & REQUESTS and len(a["requests"]["error"]) == len(b["requests"]["error"])
    pairs = _succeeded_in_both(a, b) if paired else None
    limits = a["settings"]["goodput"], b["settings"]["goodput"]
    rows = [
        Row(name, float(a[key]), float(b[key]))
        for name, key in RATES.items()
        if key != GOODPUT or limits[0] == limits[1] != {}
    ]
    rows += _latency_rows(a["requests"], b["requests"], pairs, seed)
    return Compared(load_name(a), rows, None if pairs is None else len(pairs), (a["failed"], b["failed"]))


def _succeeded_in_both(a: Json, b: Json) -> list[int]:
    errors = zip(a["requests"]["error"], b["requests"]["error"], strict=True)
    return [i for i, (one, other) in enumerate(errors) if one is None and other is None]


def _latency_rows(a: Json, b: Json, pairs: list[int] | None, seed: int) -> Iterator[Row]:
    for title, (column, points) in MEASURES.items():
        if pairs is None:
            one, other = _known(a[column]), _known(b[column])
            difference = None
        else:
            both = [i for i in pairs if a[column][i] is not None and b[column][i] is not None]
            one, other = (np.array([x[column][i] for i in both], dtype=np.float64) for x in (a, b))
            difference = float(np.median(other - one)) if len(both) else None
        if not len(one) or not len(other):
            continue
        for point, q in points:
            low, high = interval(one, other, partial(_percentile, q=q), pairs is not None, seed)
            values = _percentile(one, q), _percentile(other, q)
            yield Row(f"{title} {point}, ms", *values, difference if point == "median" else None, low, high)


def _known(values: Sequence[float | None]) -> Values:
    return np.array([value for value in values if value is not None], dtype=np.float64)


def _percentile(values: Values, q: float) -> float:
    return float(np.percentile(values, q))


def interval(
    a: Values, b: Values, statistic: Callable[[Values], float], paired: bool, seed: int
) -> tuple[float, float]:
    """The percentile bootstrap interval of statistic(b) / statistic(a) (Efron and Tibshirani 1993, section 13.3)."""
    draw = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        chosen = draw.integers(len(a), size=len(a))
        other = chosen if paired else draw.integers(len(b), size=len(b))
        below = statistic(a[chosen])
        ratios[i] = statistic(b[other]) / below if below else np.nan
    tail = (100.0 - CONFIDENCE) / 2
    low, high = np.nanpercentile(ratios, (tail, 100.0 - tail))
    return float(low), float(high)


# ---------------------------------------------------------------- reports


def tables(compared: Sequence[Compared], servers: dict[str, tuple[Any, Any]]) -> Iterator[Table | Text]:
    for name, (one, other) in servers.items():
        yield Text(f"{name}: {one} in A, {other} in B", style="dim")
    for load in compared:
        if load.pairs is None:
            how = "other requests in A than in B"
        else:
            how = f"{load.pairs} requests that succeeded in both"
        shown = Table("", "A", "B", "B - A", "B / A", f"{CONFIDENCE:g} %", "", title=f"{load.name}: {how}")
        shown.title_justify = "left"
        for column in shown.columns[1:6]:
            column.justify = "right"
        for row in load.rows:
            shown.add_row(
                row.name,
                f"{row.a:.2f}",
                f"{row.b:.2f}",
                "" if row.difference is None else f"{row.difference:+.2f}",
                f"{row.ratio:.3f}",
                "" if row.low is None else f"{row.low:.3f} to {row.high:.3f}",
                row.verdict,
            )
        yield shown
        if any(load.failed):
            yield Text(f"failed: {load.failed[0]} in A, {load.failed[1]} in B, which are in no latency", style="yellow")


def as_json(compared: Sequence[Compared], servers: dict[str, tuple[Any, Any]]) -> Json:
    return {
        "benchmark": "compare",
        "confidence": CONFIDENCE,
        "servers": {name: list(values) for name, values in servers.items()},
        "loads": [
            {
                "load": load.name,
                "pairs": load.pairs,
                "failed": list(load.failed),
                "rows": [
                    {
                        "name": row.name,
                        "a": row.a,
                        "b": row.b,
                        "median_difference": row.difference,
                        "ratio": row.ratio,
                        "low": row.low,
                        "high": row.high,
                    }
                    for row in load.rows
                ],
            }
            for load in compared
        ],
    }
