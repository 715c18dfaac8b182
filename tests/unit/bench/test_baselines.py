"""Other engines' disciplines: that each does what it is known for, and keeps the memory's books."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.bench.baselines import DecodeFirst, PrefillFirst, StaticBudget
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import RowResult, StepPlan, StepResult
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.simulate import Simulation, simulate
from quire.scheduler.step_time import StepCost
from quire.scheduler.traces import SHAREGPT, Arrival, arrival_times, draw_lengths, synthetic

COST = StepCost(16, 0.002, 0.001, 1e-6, 1e-7)
SYSTEMS = (PrefillFirst, DecodeFirst, StaticBudget)


def make(kind: type[Scheduler], **changed: Any) -> Scheduler:
    settings = {
        "num_blocks": 200,
        "block_size": 16,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64 if kind is StaticBudget else 1024 + 8,
        "max_num_prefill_tokens": 64,
        "max_model_len": 1024,
        "prefix_caching": False,
    }
    return kind(SchedulerConfig(**(settings | changed)), COST)


def steps(scheduler: Scheduler, arrivals: list[Arrival]) -> list[tuple[tuple[int, ...], ...]]:
    """Of every step the rows as (slot, start, tokens)."""
    simulation = Simulation(scheduler, arrivals, COST)
    return [tuple((row.slot, row.start, row.num_tokens) for row in step.plan.rows) for step in simulation.steps()]


LONG, SHORT = Arrival(0.0, 100, 20), Arrival(0.01, 40, 3)


def test_prefill_first_lets_streams_wait_for_whole_prompts() -> None:
    taken = steps(make(PrefillFirst), [LONG, SHORT])
    assert taken[0] == ((0, 0, 100),)
    second = next(rows for rows in taken if (1, 0, 40) in rows)
    assert second == ((1, 0, 40),)  # alone: the stream has no token in this step
    assert all({count for _, _, count in rows} == {1} for rows in taken if rows not in (taken[0], second))


def test_prefill_first_takes_all_that_fits_a_step_and_no_part() -> None:
    prompts = [Arrival(0.0, 500, 2), Arrival(0.0, 500, 2), Arrival(0.0, 500, 2), Arrival(0.0, 10, 2)]
    taken = steps(make(PrefillFirst), prompts)
    assert [[count for _, _, count in rows] for rows in taken[:2]] == [[500, 500], [500, 10]]


def test_decode_first_adds_whole_prompts_to_the_streams() -> None:
    taken = steps(make(DecodeFirst), [LONG, SHORT])
    second = next(rows for rows in taken if (1, 0, 40) in rows)
    assert len(second) == 2
    assert second[0][0] == 0
    assert second[0][2] == 1


def test_static_budget_adds_chunks_up_to_its_tokens() -> None:
    taken = steps(make(StaticBudget), [LONG, SHORT, Arrival(0.02, 100, 2)])
    assert taken[:2] == [((0, 0, 64),), ((0, 64, 36),)]
    for rows in taken:
        assert sum(count for _, _, count in rows) <= 64
    assert any(len(rows) > 1 and sum(count for _, _, count in rows) == 64 for rows in taken)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_nobody_overtakes(kind: type[Scheduler]) -> None:
    lengths = draw_lengths(SHAREGPT, 60, 2, context=1024)
    outcomes = simulate(make(kind), synthetic(arrival_times(60, 60.0, seed=2), lengths), COST)
    started = [round(outcome.first_scheduled, 9) for outcome in outcomes]
    assert started == sorted(started)


def test_our_own_order_does_overtake_in_the_same_load() -> None:
    lengths = draw_lengths(SHAREGPT, 60, 2, context=1024)
    outcomes = simulate(make(Scheduler), synthetic(arrival_times(60, 60.0, seed=2), lengths), COST)
    started = [round(outcome.first_scheduled, 9) for outcome in outcomes]
    assert started != sorted(started)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SYSTEMS), st.integers(0, 1000), st.sampled_from([66, 90, 400]), st.booleans())
def test_memory_and_slots_are_accounted_for(kind: type[Scheduler], seed: int, num_blocks: int, caching: bool) -> None:
    lengths = draw_lengths(SHAREGPT, 25, seed, context=1024)
    arrivals = synthetic(arrival_times(25, 40.0, seed=seed), lengths)
    simulation = Simulation(make(kind, num_blocks=num_blocks, prefix_caching=caching), arrivals, COST)
    for step in simulation.steps():
        simulation.scheduler.check()
        assert step.plan.num_tokens <= simulation.scheduler.config.max_num_batched_tokens
    for outcome in simulation.outcomes:
        assert (outcome.finish, outcome.num_tokens) == ("length", outcome.arrival.output_len)
    assert simulation.scheduler.pool.num_used == 0


@pytest.mark.parametrize("kind", SYSTEMS)
def test_samples_of_one_prompt_and_cached_prompts_are_served(kind: type[Scheduler]) -> None:
    scheduler = make(kind, prefix_caching=True)
    params = SamplingParams(max_tokens=4, n=3)
    scheduler.add("a", [7] * 40, params)
    drawn: dict[tuple[str, int], int] = {}
    for number in range(40):
        if number == 10:
            scheduler.add("b", [7] * 40, params)
        plan = scheduler.schedule(float(number))
        if plan is None:
            continue
        for chunk in scheduler.update(plan, answer(plan)):
            key = chunk.request_id, chunk.index
            drawn[key] = drawn.get(key, 0) + len(chunk.token_ids)
        scheduler.check()
    assert drawn == {(name, index): 4 for name in "ab" for index in range(3)}
    assert scheduler.counters.prefix_hit_tokens > 0


def answer(plan: StepPlan) -> StepResult:
    rows = [RowResult([9]) if row.samples else RowResult() for row in plan.rows]
    return StepResult(plan.step_id, rows, [RowResult([9]) for _ in plan.draws])


@pytest.mark.parametrize(("kind", "tokens"), [(PrefillFirst, 1023), (DecodeFirst, 1031)])
def test_a_step_too_small_for_a_prompt_is_refused(kind: type[Scheduler], tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_num_batched_tokens is {tokens}: .* raise it"):
        make(kind, max_num_batched_tokens=tokens)


def test_what_each_does_to_a_stream_while_prompts_come() -> None:
    """The longest gap of a stream: whole prompts one after another, one whole prompt, one chunk."""
    arrivals = [Arrival(0.0, 16, 200), *(Arrival(0.1 + 0.001 * i, 1000, 1) for i in range(4))]

    def longest(kind: type[Scheduler]) -> float:
        return max(simulate(make(kind, num_blocks=400), arrivals, COST)[0].gaps)

    gaps = [longest(kind) for kind in (PrefillFirst, DecodeFirst, StaticBudget)]
    assert all(before > 1.5 * after for before, after in pairwise(gaps))
