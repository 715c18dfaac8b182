"""A plan made while another is out: what it may count on, what it must not touch, and when it is not made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import RowResult, StepPlan, StepResult
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step_time import StepCost

COST = StepCost(tile=1, base=1e-3, per_tile=1e-4, per_context=1e-7, per_pair=1e-8)
GREEDY = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
LOOKS_BACK = replace(GREEDY, frequency_penalty=0.5)


def scheduler(**changes: object) -> Scheduler:
    settings = {
        "num_blocks": 65,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_num_prefill_tokens": 8,
        "max_model_len": 64,
        "eos_token_ids": frozenset([2]),
    }
    return Scheduler(SchedulerConfig(**(settings | changes)), COST)


def prompt(first: int, length: int) -> list[int]:
    return [first, *range(100, 99 + length)]


def plan(s: Scheduler, now: float = 0.0) -> StepPlan:
    made = s.schedule(now)
    assert made is not None
    return made


def answer(s: Scheduler, made: StepPlan, token: int = 7):
    rows = [RowResult([token] if row.samples else []) for row in made.rows]
    chunks = s.update(made, StepResult(made.step_id, rows, [RowResult([token]) for _ in made.draws]))
    s.check()
    return chunks


def test_a_token_that_is_not_known_has_its_place():
    s = scheduler()
    s.add("a", prompt(1, 6), GREEDY)
    first = plan(s)
    second = plan(s)
    assert [(row.start, row.num_tokens, row.samples) for row in second.rows] == [(6, 1, True)]
    (request,) = s.running
    assert (request.num_tokens, request.num_pending, request.num_computed) == (8, 2, 7)
    assert answer(s, first)[0].token_ids == [7]
    third = plan(s)
    assert [row.start for row in third.rows] == [7]
    answer(s, second)
    answer(s, third)
    assert request.token_ids[6:] == [7, 7, 7]
    assert request.num_pending == 0


def test_the_row_of_a_sample_that_turns_out_to_have_ended_is_dropped():
    s = scheduler()
    s.add("a", prompt(1, 6), replace(GREEDY, ignore_eos=False))
    s.add("b", prompt(2, 6), GREEDY)
    first, second = plan(s), plan(s)
    ended = [chunk.request_id for chunk in answer(s, first, token=2) if chunk.finish_reason]
    assert ended == ["a"]
    third = plan(s)
    assert third.freed == [second.rows[0].slot], "freed in a plan after its last row"
    assert [chunk.request_id for chunk in answer(s, second)] == ["b"]
    assert s.counters.discarded == 1
    answer(s, third)
    assert s.counters.discarded == 1


def test_an_end_by_length_is_known_beforehand():
    s = scheduler()
    s.add("a", prompt(1, 6), replace(GREEDY, max_tokens=2))
    first, second = plan(s), plan(s)
    assert s.schedule(0.0) is None
    answer(s, first)
    assert [chunk.finish_reason for chunk in answer(s, second)] == ["length"]
    assert s.counters.discarded == 0


def test_only_what_is_computed_for_certain_is_shared():
    """A chunk that is out fills a block; whoever has the same prompt waits until it is there."""
    s = scheduler(max_num_batched_tokens=8)
    s.add("a", prompt(1, 17), GREEDY)
    first, second = plan(s), plan(s)
    s.add("b", prompt(1, 17), GREEDY)
    answer(s, first)
    assert s.running[0].num_computed == 16
    assert s.running[0].num_published == 2, "the second chunk's blocks are not believed yet"
    answer(s, second)
    assert s.running[0].num_published == 4


def test_who_looks_back_is_not_planned_for_ahead():
    s = scheduler()
    s.add("a", prompt(1, 4), LOOKS_BACK)
    first = plan(s)
    assert not s.may_plan_ahead()
    answer(s, first)
    s.add("b", prompt(2, 12), LOOKS_BACK)
    second = plan(s)
    assert not s.may_plan_ahead()
    answer(s, second)
    s.abort("a")
    third = plan(s)
    assert third.rows[0].num_tokens == 4
    assert not s.may_plan_ahead(), "b drew its first token"
    answer(s, third)


def test_a_prompt_in_progress_may_look_back_later():
    s = scheduler(max_num_batched_tokens=8)
    s.add("long", prompt(1, 30), LOOKS_BACK)
    first = plan(s)
    assert s.may_plan_ahead()
    second = plan(s)
    assert [(row.start, row.num_tokens) for row in second.rows] == [(8, 8)]
    answer(s, first)
    answer(s, second)


def test_nobody_is_preempted_while_a_step_is_out():
    s = scheduler(num_blocks=7, max_model_len=20)
    s.add("a", prompt(1, 8), GREEDY)
    s.add("b", prompt(2, 8), GREEDY)
    answer(s, plan(s))
    made = [plan(s)]  # each took its third block
    while s.may_plan_ahead():
        made.append(plan(s))
        answer(s, made.pop(0))
    assert s.counters.preemptions == 0
    with pytest.raises(RuntimeError, match="may_plan_ahead"):
        s.schedule(0.0)


def test_a_place_that_is_to_be_taken_is_taken_when_nothing_is_out():
    s = scheduler(max_num_seqs=1, policy="priority")
    s.add("low", prompt(1, 4), GREEDY, priority=5)
    first = plan(s)
    s.add("high", prompt(2, 4), GREEDY, priority=-5)
    assert s.may_plan_ahead()
    second = plan(s)
    assert second.new == []
    assert not s.may_plan_ahead()
    answer(s, first)
    answer(s, second)
    third = plan(s)
    assert third.new
    assert s.running[0].request_id == "high"
    answer(s, third)
    assert s.may_plan_ahead()


def test_plans_are_answered_in_turn():
    s = scheduler()
    s.add("a", prompt(1, 4), GREEDY)
    first, second = plan(s), plan(s)
    with pytest.raises(ValueError, match="out of turn"):
        s.update(second, StepResult(second.step_id, [RowResult([7])]))
    with pytest.raises(ValueError, match="out of turn"):
        s.update(first, StepResult(second.step_id, [RowResult([7])]))
    answer(s, first)
    answer(s, second)


def test_a_fork_that_looks_back_waits_for_its_first_token():
    s = scheduler()
    s.add("a", prompt(1, 4), replace(LOOKS_BACK, n=2))
    answer(s, plan(s))
    made = plan(s)
    assert len(made.draws) == 1
    assert made.draws[0].slot not in {row.slot for row in made.rows}
    s = scheduler()
    s.add("a", prompt(1, 4), replace(GREEDY, n=2))
    answer(s, plan(s))
    made = plan(s)
    assert made.draws[0].slot in {row.slot for row in made.rows}
