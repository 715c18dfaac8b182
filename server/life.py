"""Whether the engine starts, serves, hangs or is gone; and what that means to whoever asks.

    starting ──▶ serving ──▶ restarting ──▶ serving …        any of them ──▶ dead

Written by the dispatcher on the event loop, read from any thread: by probes, by metrics, and before each request.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.messages import EngineDead, Progress
from . import errors

STATES = ("starting", "serving", "hung", "restarting", "dead")
FIRST_WAIT = 5.0  # seconds, for Retry-After: nobody knows how long the first start takes


class Life:
    """heartbeat_age: of the engine, in seconds, infinite where there is none; older than `hang_timeout` it hangs."""

    def __init__(self, heartbeat_age: Callable[[], float], hang_timeout: float) -> None:
        self.heartbeat_age = heartbeat_age
        self._hang_timeout = hang_timeout
        self._phase: Literal["starting", "serving", "restarting", "dead"] = "serving"
        self._since = time.monotonic()
        self._start_seconds: float | None = None
        self.progress: Progress | None = None  # of the start that goes on
        self.restarts: Counter[str] = Counter()  # by why there had to be one
        self.hangs = 0

    @property
    def over(self) -> bool:
        """No engine will ever serve again."""
        return self._phase == "dead"

    def trouble(self) -> str | None:
        """Why no request can be served now: one of STATES, or None."""
        if self._phase != "serving":
            return self._phase
        return "hung" if self.heartbeat_age() > self._hang_timeout else None

    def refusal(self) -> errors.ApiError | None:
        """The answer to a request that comes now, if it is not to be served."""
        trouble = self.trouble()
        if trouble in ("starting", "restarting"):
            return self.starting()
        return None if trouble is None else errors.engine_dead()

    def starting(self) -> errors.ApiError:
        """503, to be tried again when the start should be over."""
        passed = time.monotonic() - self._since
        return errors.engine_starting(FIRST_WAIT if self._start_seconds is None else self._start_seconds - passed)

    def begins(self) -> None:
        self._enter("starting")

    def progresses(self, progress: Progress) -> None:
        self.progress = progress

    def has_started(self) -> None:
        """The first engine is up, and all that the server makes of its model; unless it has ended meanwhile."""
        if self._phase == "starting":
            self._start_seconds = time.monotonic() - self._since
            self.serves()

    def serves(self) -> None:
        self.progress = None
        self._enter("serving")

    def hangs_now(self) -> None:
        self.hangs += 1

    def ends(self, message: EngineDead) -> None:
        self.progress = None
        if message.final:
            self._enter("dead")
        else:
            self.restarts[message.kind] += 1
            self._enter("restarting")

    def _enter(self, phase: Literal["starting", "serving", "restarting", "dead"]) -> None:
        self._phase = phase
        self._since = time.monotonic()


class Report(NamedTuple):
    """What a probe is answered: 200, or 503."""

    status: int
    body: dict[str, Any]

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.status == 200 else {"Retry-After": "5"}


def health(life: Life) -> Report:
    """The engine serves: its loop turns. Load and drain do not change it."""
    trouble = life.trouble()
    if trouble is None:
        return Report(200, {"status": "ok"})
    body: dict[str, Any] = {"status": trouble}
    if (progress := life.progress) is not None:
        body |= {"phase": progress.phase, "seconds": progress.seconds}
        if progress.done is not None:
            body["done"] = round(progress.done, 3)
    return Report(503, body)


def ready(life: Life, *, draining: bool) -> Report:
    """A request sent now would be let in."""
    report = health(life)
    return Report(503, {"status": "draining"}) if draining and report.status == 200 else report


def live(life: Life) -> Report:
    """The server is worth keeping: it serves, or there will be an engine again. To restart it all would help only when
    the engine was given up."""
    return Report(503, {"status": "dead"}) if life.over else Report(200, {"status": "ok"})


class LifeMetrics(Collector):
    """The same in numbers; there is a page of them before there is an engine."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        life = self._life
        now = life.trouble() or "serving"
        state = GaugeMetricFamily("quire_engine_state", "1 for the state that the engine is in.", labels=("state",))
        for name in STATES:
            state.add_metric((name,), name == now)
        yield state
        phase = GaugeMetricFamily(
            "quire_engine_start_progress", "Of a start that goes on: how much of its phase is done.", labels=("phase",)
        )
        if (progress := life.progress) is not None:
            phase.add_metric((progress.phase,), progress.done or 0.0)
        yield phase
        restarts = CounterMetricFamily(
            "quire_engine_restarts", "Times that the engine had to be started again, by why.", labels=("reason",)
        )
        for reason in ("crash", "hang", "start"):
            restarts.add_metric((reason,), life.restarts[reason])
        yield restarts
        yield CounterMetricFamily("quire_engine_hung", "Times that the engine was taken to hang.", value=life.hangs)
        heartbeat = GaugeMetricFamily(
            "quire_engine_heartbeat_age_seconds",
            "Since the engine's last sign of life; absent where none serves.",
            labels=(),
        )
        if math.isfinite(age := life.heartbeat_age()):
            heartbeat.add_metric((), age)
        yield heartbeat
