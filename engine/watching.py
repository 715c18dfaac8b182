"""What is told of the engine's work while somebody watches it, and only then: no step pays for an empty room."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ..scheduler.plan import StepPlan, StepResult
from ..scheduler.scheduler import Scheduler
from .messages import Holding, Holdings, StepBatch

# Between two looks at who holds what. A look walks over all blocks and samples: 1 ms for 10,000 blocks, so 0.2 %.
HOLDINGS_SECONDS = 0.5


class Watching:
    """Whether somebody watches: for as long as the last `renew` said."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = self._due = -math.inf
        self._batch: StepBatch | None = None

    @property
    def is_on(self) -> bool:
        return self._clock() < self._until

    def renew(self, seconds: float) -> None:
        self._until = self._clock() + seconds

    def saw(self, batch: StepBatch) -> None:
        """The step whose news go out next."""
        self._batch = batch

    def batch(self) -> StepBatch | None:
        """The step that was last seen, once."""
        batch, self._batch = self._batch, None
        return batch

    def holdings(self, scheduler: Scheduler) -> Holdings | None:
        """Who holds what, if it is time to look."""
        now = self._clock()
        if now >= self._until or now < self._due:
            return None
        self._due = now + HOLDINGS_SECONDS
        return holdings_of(scheduler)


def batch_of(plan: StepPlan, result: StepResult, accepted: int, seconds: float) -> StepBatch:
    """`accepted`: guesses that were drawn in this step, of all rows together."""
    # A sample that forks has its prompt: what it enters with is the one token that it drew.
    entered = {new.slot for new in plan.new} - {draw.slot for draw in plan.draws}
    decodes = packed_prompts = packed_tokens = chunk_prompts = chunk_tokens = drafted = 0
    for row, got in zip(plan.rows, result.rows, strict=True):
        if row.draft is not None:
            decodes += 1
            drafted += got.drafted
        elif row.slot in entered and row.samples:
            packed_prompts += 1
            packed_tokens += row.num_tokens
        elif row.num_tokens == 1 and row.samples:
            decodes += 1
        else:
            chunk_prompts += 1
            chunk_tokens += row.num_tokens
    return StepBatch(decodes, packed_prompts, packed_tokens, chunk_prompts, chunk_tokens, drafted, accepted, seconds)


def holdings_of(scheduler: Scheduler) -> Holdings:
    waiting: dict[str, int] = {}
    running: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for group in scheduler.roster.groups.values():
        idle = group.num_unborn + sum(sample.slot < 0 for sample in group.live)
        waiting[group.tenant] = waiting.get(group.tenant, 0) + idle
    for request in scheduler.running:
        tenant = request.group.tenant
        running[tenant] = running.get(tenant, 0) + 1
        blocks[tenant] = blocks.get(tenant, 0) + len(request.block_ids)
    tenants = [Holding(name, count, running.get(name, 0), blocks.get(name, 0)) for name, count in waiting.items()]
    census = scheduler.pool.census()
    return Holdings(census.shared, census.whole, census.open, tenants)
