"""The real scheduler on a clock of its own, with the face of an engine: what drives a live one drives this.

Traces of thousands of requests play faster in `scheduler/simulate.py`; this is for loads that react to what they see.
"""

from __future__ import annotations

from ..engine.messages import Abort, AddRequest
from ..scheduler.plan import Chunk, RowResult, StepResult
from ..scheduler.scheduler import Scheduler
from ..scheduler.step_time import StepCost


class SimulatedEngine:
    """An `Engine` and its `Clock` (live.py). Every token drawn is 0."""

    def __init__(self, scheduler: Scheduler, cost: StepCost) -> None:
        """cost: how long the steps take, in truth."""
        self.scheduler = scheduler
        self.cost = cost
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += max(0.0, seconds)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def handle(self, message: AddRequest | Abort) -> list[Chunk]:
        if isinstance(message, Abort):
            return [chunk for request_id in message.request_ids for chunk in self.scheduler.abort(request_id)]
        self.scheduler.add(
            message.request_id,
            message.prompt_ids,
            message.params,
            priority=message.priority,
            arrival=message.arrival,
            tenant=message.tenant,
            slo=message.slo,
        )
        return []

    def step(self) -> list[Chunk]:
        expired = self.scheduler.expire(self._now)
        plan = self.scheduler.schedule(self._now)
        if plan is None:
            return expired
        seconds = self.cost.seconds(self.scheduler.shape)
        self._now += seconds
        rows = [RowResult([0] if row.samples else []) for row in plan.rows]
        result = StepResult(plan.step_id, rows, [RowResult([0]) for _ in plan.draws])
        return expired + self.scheduler.update(plan, result, seconds)
