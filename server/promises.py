"""What a request was promised and what its samples got: the clock of a sample, and the verdict at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..engine.validation import TIMEOUT_BOUNDS
from ..scheduler.params import Slo
from . import errors

TIMEOUT_HEADER = "x-request-timeout-ms"
TAIL = 0.99
MAX_DIGITS = 12  # of a count of milliseconds: the rest would change nothing
LEAST_FOR_TAIL = 100  # gaps; of fewer than these the 99th percentile is the largest


@dataclass(slots=True)
class SampleClock:
    """When the news of one sample came, in seconds of time.monotonic().

    first, last  of its tokens; None while there are none
    heard        of anything, its end included
    gaps         between deliveries of tokens; kept only where a gap was promised
    """

    first: float | None = None
    last: float | None = None
    heard: float | None = None
    gaps: list[float] = field(default_factory=list)


def header_timeout(value: str | None) -> float | None:
    """Seconds from TIMEOUT_HEADER, which gateways set where a body has `timeout`. Raises 400 for what is no count."""
    if value is None:
        return None
    digits = value.lstrip("0")[:MAX_DIGITS]
    if not (value.isascii() and value.isdecimal() and digits):
        what = "must be a whole number of milliseconds, at least 1"
        raise errors.invalid(f"The header {TIMEOUT_HEADER} {what}; got {errors.shown(value)}.", TIMEOUT_HEADER)
    return min(int(digits) / 1000, TIMEOUT_BOUNDS[1])


def verdict(slo: Slo, arrival: float, clock: SampleClock, *, finished: bool) -> dict[str, bool]:
    """{promise: kept} of the promises that were asked for; `finished` is False for a sample that ran out of time.

    ttft      its first token came in time; of a sample that draws none, its end
    itl       its tail gap is not longer: the 99th percentile of its gaps, the longest of fewer than 100
    deadline  it finished in time
    """
    heard = math.inf if clock.heard is None else clock.heard
    kept: dict[str, bool] = {}
    if slo.ttft is not None:
        begun = heard if clock.first is None and finished else math.inf if clock.first is None else clock.first
        kept["ttft"] = begun - arrival <= slo.ttft
    if slo.itl is not None:
        kept["itl"] = tail(clock.gaps) <= slo.itl if clock.gaps else finished
    if slo.deadline is not None:
        kept["deadline"] = finished and heard - arrival <= slo.deadline
    return kept


def tail(gaps: list[float]) -> float:
    """The 99th percentile of at least one gap by nearest rank; the longest of fewer than 100."""
    if len(gaps) < LEAST_FOR_TAIL:
        return max(gaps)
    return sorted(gaps)[math.ceil(TAIL * len(gaps)) - 1]
