"""Plays a trace through the real scheduler, on a clock of its own.

    arrivals ──▶ Scheduler ──StepPlan──▶ cost: how long it takes ──▶ clock
                     ▲                                                 │
                     └────────────── update, measured seconds ◀────────┘

Nothing is computed but time: a row that reaches the end of what is known draws its sequence's own token again. What is
simulated is therefore exactly what the engine would schedule, given that its steps take as long as `cost` says.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .params import SamplingParams
from .plan import Chunk, RowResult, StepPlan, StepResult
from .roster import Refused
from .scheduler import Scheduler
from .step_time import StepCost, StepShape
from .traces import Arrival, token_ids

NEVER = -1.0


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds on the trace's clock; NEVER where it did not come to that.

    gaps    between successive tokens, whatever held them up: long steps, preemption
    finish  "length" = all tokens were drawn, "expired", "refused" (never queued), "" = still under way
    """

    arrival: Arrival
    first_scheduled: float = NEVER
    first_token: float = NEVER
    last_token: float = NEVER
    end: float = NEVER
    gaps: array[float] = field(default_factory=lambda: array("d"))
    num_cached: int = 0
    finish: str = ""

    @property
    def delay(self) -> float:
        """Scheduling delay: from arrival to the first step that it was in."""
        return self.first_scheduled - self.arrival.time

    @property
    def ttft(self) -> float:
        return self.first_token - self.arrival.time

    @property
    def num_tokens(self) -> int:
        """Drawn."""
        return len(self.gaps) + (self.first_token != NEVER)


@dataclass(slots=True)
class Step:
    """A step that was taken. Valid until the next one is asked for."""

    start: float
    end: float
    plan: StepPlan
    shape: StepShape
    chunks: list[Chunk]


class Simulation:
    """One trace at one scheduler. `outcomes` stand beside the arrivals; `steps()` moves the clock."""

    def __init__(
        self, scheduler: Scheduler, arrivals: Sequence[Arrival], cost: StepCost, *, noise: float = 0.0, seed: int = 0
    ) -> None:
        """`cost` is the truth; `noise` the standard deviation of the logarithm of measured over true (median 1)."""
        self.scheduler = scheduler
        self.cost = cost
        self.noise = noise
        self.now = 0.0
        self.outcomes = [Outcome(arrival) for arrival in arrivals]
        self._draw = random.Random(seed)
        self._due = deque(enumerate(self.outcomes))
        self._open: dict[str, Outcome] = {}
        self._answers = [RowResult()] * scheduler.config.max_num_seqs  # of a row that draws, by slot

    def steps(self) -> Iterator[Step]:
        """Until the last request has ended. Raises RuntimeError if the scheduler stands still with work to do."""
        scheduler = self.scheduler
        while self._due or scheduler.has_work:
            self._arrive()
            self._settle(scheduler.expire(self.now), self.now)
            plan = scheduler.schedule(self.now)
            if plan is not None:
                yield self._take(plan)
            elif not scheduler.has_work:
                if self._due:
                    self.now = max(self.now, self._due[0][1].arrival.time)
            else:
                raise RuntimeError(f"{len(scheduler.waiting)} requests wait, and nothing is scheduled")

    def delays(self) -> Iterator[float]:
        """Scheduling delays so far: of who waits, the time until now; nothing of who has not come."""
        running = {request.request_id for request in self.scheduler.running}
        for serial, outcome in enumerate(self.outcomes):
            if outcome.first_scheduled != NEVER:
                yield outcome.delay
            elif outcome.arrival.time <= self.now and not outcome.finish and str(serial) not in running:
                yield self.now - outcome.arrival.time

    def _arrive(self) -> None:
        """Queue what has come until now."""
        while self._due and self._due[0][1].arrival.time <= self.now:
            serial, outcome = self._due.popleft()
            arrival, name = outcome.arrival, str(serial)
            params = SamplingParams(max_tokens=arrival.output_len, ignore_eos=True)
            try:
                self.scheduler.add(
                    name,
                    token_ids(arrival, serial),
                    params,
                    priority=arrival.priority,
                    arrival=arrival.time,
                    tenant=arrival.tenant,
                )
            except Refused:
                outcome.finish, outcome.end = "refused", self.now
            else:
                self._open[name] = outcome

    def _take(self, plan: StepPlan) -> Step:
        answers, nothing = self._answers, RowResult()
        for new in plan.new:
            answers[new.slot] = RowResult([new.token_ids[-1]])
        shape = self.scheduler.shape
        seconds = self.cost.seconds(shape)
        if self.noise:
            seconds *= self._draw.lognormvariate(0.0, self.noise)
        start, self.now = self.now, self.now + seconds
        rows = [answers[row.slot] if row.samples else nothing for row in plan.rows]
        result = StepResult(plan.step_id, rows, [answers[draw.slot] for draw in plan.draws])
        chunks = self.scheduler.update(plan, result, seconds)
        self._settle(chunks, self.now)
        return Step(start, self.now, plan, shape, chunks)

    def _settle(self, chunks: list[Chunk], now: float) -> None:
        for chunk in chunks:
            outcome = self._open[chunk.request_id]
            if chunk.token_ids:
                if outcome.first_token == NEVER:
                    outcome.first_token = now
                    outcome.first_scheduled = outcome.arrival.time + chunk.queued_seconds
                    outcome.num_cached = chunk.num_cached
                else:
                    outcome.gaps.append(now - outcome.last_token)
                outcome.last_token = now
            if chunk.finish_reason is not None:
                outcome.finish, outcome.end = chunk.finish_reason, now
                del self._open[chunk.request_id]


def simulate(
    scheduler: Scheduler, arrivals: Sequence[Arrival], cost: StepCost, *, noise: float = 0.0, seed: int = 0
) -> list[Outcome]:
    """Play `arrivals` (in order of time) to the end; what became of each, beside them."""
    simulation = Simulation(scheduler, arrivals, cost, noise=noise, seed=seed)
    for _ in simulation.steps():
        pass
    return simulation.outcomes
