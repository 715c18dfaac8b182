"""Plays a trace through the real scheduler, on a clock of its own.

    arrivals ──▶ Scheduler ──StepPlan──▶ cost: how long it takes ──▶ clock
                     ▲                                                 │
                     └────────────── update, measured seconds ◀────────┘

Nothing is computed but time: a row that reaches the end of what is known draws its sequence's own token again, and of
guesses as many are right as a die says. What is simulated is therefore exactly what the engine would schedule, given
that its steps take as long as `cost` and `guessing` say.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .draft_cost import num_passes, rows_by_level
from .params import SamplingParams
from .plan import Chunk, DraftPass, Row, RowResult, StepPlan, StepResult
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


class Guessing(NamedTuple):
    """What guessing is like in truth: how often it is right, and seconds.

    acceptance  of a level that is reached, by the request's place among the arrivals; in turn where there are more
    fixed, per_node  beyond what `cost` says of a step's rows
    """

    acceptance: Sequence[float]
    per_level: float = 0.0
    per_row: float = 0.0
    fixed: float = 0.0
    per_node: float = 0.0


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
        self,
        scheduler: Scheduler,
        arrivals: Sequence[Arrival],
        cost: StepCost,
        *,
        noise: float = 0.0,
        seed: int = 0,
        guessing: Guessing | None = None,
    ) -> None:
        """`cost` is the truth; `noise` the standard deviation of the logarithm of measured over true (median 1)."""
        self.scheduler = scheduler
        self.cost = cost
        self.noise = noise
        self.guessing = guessing or Guessing((0.0,))
        self.now = 0.0
        self.outcomes = [Outcome(arrival) for arrival in arrivals]
        self._draw = random.Random(seed)
        self._due = deque(enumerate(self.outcomes))
        self._open: dict[str, Outcome] = {}
        self._answers = [RowResult()] * scheduler.config.max_num_seqs  # of a row that draws, by slot

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._due) + len(self._open)

    def submit(self, arrival: Arrival) -> Outcome:
        """One more request, which comes no earlier than those before it: `steps` goes on with it."""
        outcome = Outcome(arrival)
        self._due.append((len(self.outcomes), outcome))
        self.outcomes.append(outcome)
        return outcome

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
        rows = [answers[row.slot] if row.samples else nothing for row in plan.rows]
        drafting: list[DraftPass] = []
        drafted = [i for i, row in enumerate(plan.rows) if row.draft]
        if drafted:
            self._verify(plan.rows, rows, drafted)
            drafting = self._passes(plan.rows)
            nodes = sum(rows[i].drafted for i in drafted)
            seconds += self.guessing.fixed + self.guessing.per_node * nodes + sum(done.seconds for done in drafting)
        if self.noise:
            seconds *= self._draw.lognormvariate(0.0, self.noise)
        start, self.now = self.now, self.now + seconds
        result = StepResult(plan.step_id, rows, [answers[draw.slot] for draw in plan.draws], drafting)
        chunks = self.scheduler.update(plan, result, seconds)
        self._settle(chunks, self.now)
        return Step(start, self.now, plan, shape, chunks)

    def _verify(self, rows: Sequence[Row], answers: list[RowResult], drafted: Sequence[int]) -> None:
        """Put into `answers` what comes of the rows with guesses: all that were ordered are made."""
        names = {request.slot: int(request.request_id) for request in self.scheduler.running}
        acceptance = self.guessing.acceptance
        for i in drafted:
            draft = rows[i].draft
            assert draft is not None
            chance, depth, accepted = acceptance[names[rows[i].slot] % len(acceptance)], draft.shape.depth, 0
            while accepted < depth and self._draw.random() < chance:
                accepted += 1
            answers[i] = RowResult(answers[i].token_ids * (accepted + 1), drafted=draft.shape.nodes, draft_depth=depth)

    def _passes(self, rows: Sequence[Row]) -> list[DraftPass]:
        """What guessing took, by method."""
        levels: dict[str, int] = {}
        counts: dict[str, int] = {}
        for order in (row.draft for row in rows if row.draft):
            levels[order.method] = max(levels.get(order.method, 0), num_passes(order.method, order.shape.depth))
            counts[order.method] = counts.get(order.method, 0) + sum(rows_by_level(order))
        per_level, per_row = self.guessing.per_level, self.guessing.per_row
        return [
            DraftPass(method, levels[method], count, per_level * levels[method] + per_row * count)
            for method, count in counts.items()
        ]

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
                outcome.gaps.extend([0.0] * (len(chunk.token_ids) - 1))  # what is accepted together comes together
                outcome.last_token = now
            if chunk.finish_reason is not None:
                outcome.finish, outcome.end = chunk.finish_reason, now
                del self._open[chunk.request_id]


def simulate(
    scheduler: Scheduler,
    arrivals: Sequence[Arrival],
    cost: StepCost,
    *,
    noise: float = 0.0,
    seed: int = 0,
    guessing: Guessing | None = None,
) -> list[Outcome]:
    """Play `arrivals` (in order of time) to the end; what became of each, beside them."""
    simulation = Simulation(scheduler, arrivals, cost, noise=noise, seed=seed, guessing=guessing)
    for _ in simulation.steps():
        pass
    return simulation.outcomes
