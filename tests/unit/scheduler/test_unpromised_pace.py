"""Without any promise and any bound in tokens, a step beside streams takes in what 80 ms allow."""

from __future__ import annotations

import pytest

from quire.scheduler.budget import UNPROMISED
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import RowResult, StepResult
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step_time import StepCost, StepShape


def scheduler(cost: StepCost, **settings: object) -> Scheduler:
    config = SchedulerConfig(
        num_blocks=1000,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        max_model_len=4096,
        **settings,  # type: ignore[arg-type]
    )
    return Scheduler(config, cost)


def chunk_beside_a_stream(made: Scheduler) -> int:
    """Rows of a long prompt in a step that carries a stream."""
    made.add("stream", [1] * 20, SamplingParams(max_tokens=50))
    plan = made.schedule(0.0)
    made.update(plan, StepResult(plan.step_id, [RowResult([5])], []))
    made.add("prompt", [2] * 3000, SamplingParams(max_tokens=1))
    return max(row.num_tokens for row in made.schedule(0.0).rows)


@pytest.mark.parametrize("per_tile", [1e-3, 5e-3, 10e-3])
def test_as_many_tokens_as_fit(per_tile: float) -> None:
    cost = StepCost(16, 20e-3, per_tile, 0.0, 0.0)
    made = scheduler(cost)
    count = chunk_beside_a_stream(made)
    bound = UNPROMISED / made.steps.margin
    assert cost.seconds(StepShape(count + 1)) <= bound
    assert count >= min(512 - 16, 16 * int((bound - cost.base) / per_tile) - 16)


def test_a_bound_in_tokens_replaces_it() -> None:
    assert chunk_beside_a_stream(scheduler(StepCost(16, 1e-3, 1e-5, 0.0, 0.0), max_num_prefill_tokens=48)) <= 48


def test_a_promise_replaces_it() -> None:
    cost = StepCost(16, 20e-3, 10e-3, 0.0, 0.0)
    assert chunk_beside_a_stream(scheduler(cost, slo_itl=0.2)) > chunk_beside_a_stream(scheduler(cost))
