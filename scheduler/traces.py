"""Traffic: when requests come, how long they are, whose they are. Made by a seed, or read from a file.

times ──┐
lengths ┴─▶ synthetic() / conversations() / read_trace() ──▶ [Arrival, …] in order of time ──▶ merged()
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from heapq import merge
from pathlib import Path
from typing import NamedTuple

Z90 = 1.2815515594  # standard normal quantile at 0.9
MIN_LENGTH = 4  # tokens; the published traces' own filter: shorter turns are noise


class Arrival(NamedTuple):
    """One request of a trace.

    time        seconds from the trace's start
    prompt_len  tokens; of a later turn the whole conversation so far, its answers included
    output_len  tokens, all of which are drawn
    tenant      "" = nobody in particular
    session     turns of one session share their tokens as far as they go; -1 = shares with nobody
    turn        0 = the first of its session
    priority    as `Scheduler.add` takes it
    """

    time: float
    prompt_len: int
    output_len: int
    tenant: str = ""
    session: int = -1
    turn: int = 0
    priority: int = 0


class Lengths(NamedTuple):
    prompt_len: int
    output_len: int


class LengthLaw(NamedTuple):
    """Lognormal lengths, independent of each other: (median, 90th percentile) of each, in tokens.

    context: prompt and output together are at most this.
    """

    prompt: tuple[int, int]
    output: tuple[int, int]
    context: int


# Sarathi-Serve (arXiv 2403.02310, table 2); what was longer than the context was left out of these traces.
SHAREGPT = LengthLaw((1730, 5696), (415, 834), 8192)  # openchat_sharegpt4
ARXIV = LengthLaw((7059, 12985), (208, 371), 16384)  # arxiv_summarization
LAWS = {"sharegpt": SHAREGPT, "arxiv": ARXIV}


class TraceError(ValueError):
    """A trace file that cannot be played; the message names file, line, field and remedy."""


# ---------------------------------------------------------------- how long


def draw_lengths(law: LengthLaw, count: int, seed: int, context: int | None = None) -> list[Lengths]:
    """`count` lengths of `law`, scaled down where `context` is shorter than the law's.

    What would not fit together is cut, not drawn again: that leaves both quantiles where the law has them.
    """
    limit = min(context or law.context, law.context)
    draw = random.Random(seed)

    def length(median: int, p90: int, most: int) -> int:
        drawn = draw.lognormvariate(math.log(median * limit / law.context), math.log(p90 / median) / Z90)
        return min(max(round(drawn), MIN_LENGTH), most)

    outputs = [length(*law.output, most=limit // 2) for _ in range(count)]
    return [Lengths(length(*law.prompt, most=limit - output), output) for output in outputs]


# ---------------------------------------------------------------- when


def arrival_times(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds from the start at which `count` requests are due, at `rate` requests a second on average.

    Gaps are gamma distributed with shape `burstiness` and mean 1 / rate: 1 is the Poisson process, below 1 comes in
    bursts, above 1 evens out (coefficient of variation 1 / sqrt(burstiness)). The first request is due at once.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"request rate {rate} and burstiness {burstiness} must be above 0")
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += draw.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


# ---------------------------------------------------------------- traces


def synthetic(times: Sequence[float], lengths: Sequence[Lengths], tenant: str = "", priority: int = 0) -> list[Arrival]:
    """Requests that have nothing to do with each other."""
    return [
        Arrival(time, shape.prompt_len, shape.output_len, tenant, priority=priority)
        for time, shape in zip(times, lengths, strict=True)
    ]


def conversations(
    starts: Sequence[float],
    law: LengthLaw,
    *,
    turns: float,
    think: float,
    seed: int = 0,
    tenant: str = "",
    first_session: int = 0,
) -> list[Arrival]:
    """Sessions that begin at `starts`: a geometric number of turns, `turns` on average, within the law's context.

    `law` gives the lengths of what each turn adds; its prompt is all that was said before and its own question. Turns
    are exponential gaps of mean `think` seconds apart, whether or not the answer has come: an open loop.
    """
    if not turns >= 1 or not think > 0:
        raise ValueError(f"turns {turns} must be at least 1, think {think} above 0")
    draw = random.Random(seed)
    arrivals = []
    for session, start in enumerate(starts, first_session):
        now, said, turn = start, 0, 0
        while True:
            question, answer = draw_lengths(law, 1, draw.getrandbits(64))[0]
            if said + question + answer > law.context:
                break
            arrivals.append(Arrival(now, said + question, answer, tenant, session, turn))
            said += question + answer
            turn += 1
            now += draw.expovariate(1 / think)
            if draw.random() * turns < 1:
                break
    return sorted(arrivals)


def merged(*traces: Sequence[Arrival]) -> list[Arrival]:
    """Several tenants' traffic at one server."""
    return list(merge(*traces, key=lambda arrival: arrival.time))


def at_rate(unit: Sequence[Arrival], rate: float) -> list[Arrival]:
    """A trace of one request a second, played at `rate`: the same requests in the same order."""
    return [arrival._replace(time=arrival.time / rate) for arrival in unit]


def token_ids(arrival: Arrival, serial: int) -> list[int]:
    """A prompt for `arrival`, the `serial`-th of its trace.

    One id throughout: a block's name depends on its place as well, so that turns of a session share exactly the blocks
    that they have in common, and nobody else's.
    """
    return [2 * arrival.session if arrival.session >= 0 else 2 * serial + 1] * arrival.prompt_len


# ---------------------------------------------------------------- files


def read_trace(path: Path) -> list[Arrival]:
    """A trace from JSON lines {"time", "prompt_len", "output_len"} with optional "tenant", "session", "priority".

    Raises TraceError for the first line that does not hold together.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"trace {path} cannot be read: {error}") from error
    arrivals: list[Arrival] = []
    turns: dict[int, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        arrival = _arrival(line, f"trace {path} line {number}")
        if arrivals and arrival.time < arrivals[-1].time:
            raise TraceError(
                f'trace {path} line {number}: "time" is {arrival.time:g}, before the line above it '
                f"({arrivals[-1].time:g}): sort the lines by time"
            )
        if arrival.session >= 0:
            arrival = arrival._replace(turn=turns.get(arrival.session, 0))
            turns[arrival.session] = arrival.turn + 1
        arrivals.append(arrival)
    if not arrivals:
        raise TraceError(f"trace {path} has no requests: write one JSON object a line")
    return arrivals


_SHAPE = 'write {"time": seconds, "prompt_len": tokens, "output_len": tokens}'
_LEAST = {"time": 0.0, "prompt_len": 1, "output_len": 1, "session": 0}


def _arrival(line: str, where: str) -> Arrival:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where} is not JSON ({error}): {_SHAPE}") from error
    if not isinstance(row, dict):
        raise TraceError(f"{where} is not an object: {_SHAPE}")
    unknown = row.keys() - {"time", "prompt_len", "output_len", "tenant", "session", "priority"}
    if unknown:
        raise TraceError(f"{where}: nothing is known of {min(unknown)!r}: leave it out, or {_SHAPE}")
    for name in ("time", "prompt_len", "output_len"):
        if name not in row:
            raise TraceError(f'{where}: "{name}" is missing: {_SHAPE}')
    for name, value in row.items():
        kind, wanted = (str, "a text") if name == "tenant" else (int, "a whole number")
        if name == "time":
            good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            wanted = "a number of seconds"
        else:
            good = isinstance(value, kind) and not isinstance(value, bool)
        if not good:
            raise TraceError(f'{where}: "{name}" is {value!r}: give {wanted}')
        if name in _LEAST and value < _LEAST[name]:
            raise TraceError(f'{where}: "{name}" is {value}: give {wanted}, at least {_LEAST[name]:g}')
    return Arrival(**row | {"time": float(row["time"])})
