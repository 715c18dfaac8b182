"""The simulator against closed forms, and what must hold of every run."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.drafts import parse_shape
from quire.scheduler.policy import POLICIES
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.simulate import NEVER, Guessing, Simulation, simulate
from quire.scheduler.step_time import StepCost
from quire.scheduler.traces import SHAREGPT, Arrival, LengthLaw, arrival_times, conversations, draw_lengths, synthetic

CONSTANT = StepCost(128, 1.0, 0.0, 0.0, 0.0)  # every step takes a second
LINEAR = StepCost(16, 0.002, 0.001, 1e-6, 1e-7)


def scheduler(cost: StepCost, **changed: Any) -> Scheduler:
    settings = {
        "num_blocks": 1000,
        "block_size": 16,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_num_prefill_tokens": 256,
        "max_model_len": 2048,
        "prefix_caching": False,
    }
    return Scheduler(SchedulerConfig(**(settings | changed)), cost)


def test_one_request_takes_its_steps_one_after_another() -> None:
    (outcome,) = simulate(scheduler(CONSTANT), [Arrival(3.0, 100, 5)], CONSTANT)
    assert outcome.first_scheduled == 3.0
    assert outcome.first_token == 4.0
    assert list(outcome.gaps) == [1.0] * 4
    assert (outcome.end, outcome.finish, outcome.num_tokens) == (8.0, "length", 5)


def test_a_long_prompt_takes_as_many_steps_as_it_has_chunks() -> None:
    (outcome,) = simulate(scheduler(CONSTANT), [Arrival(0.0, 2 * 512 + 1, 1)], CONSTANT)
    assert (outcome.delay, outcome.ttft) == (0.0, 3.0)


def test_a_step_takes_what_the_cost_says_of_its_rows() -> None:
    (outcome,) = simulate(scheduler(LINEAR), [Arrival(0.0, 40, 3)], LINEAR)
    assert outcome.ttft == pytest.approx(0.002 + 3 * 0.001 + 1e-7 * 40 * 20)
    assert list(outcome.gaps) == pytest.approx([0.003 + 1e-6 * 41, 0.003 + 1e-6 * 42])


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_mean_wait_is_that_of_the_m_d_1_queue(load: float) -> None:
    """One request at a time, each one step of a second: Pollaczek and Khinchine give load / (2 (1 - load))."""
    arrivals = [Arrival(time, 1, 1) for time in arrival_times(40_000, load, seed=5)]
    one_at_a_time = scheduler(CONSTANT, max_num_seqs=1)
    outcomes = simulate(one_at_a_time, arrivals, CONSTANT)
    assert statistics.fmean(o.delay for o in outcomes) == pytest.approx(load / (2 * (1 - load)), rel=0.1)
    assert {round(o.end - o.first_scheduled, 9) for o in outcomes} == {1.0}


def mixed(seed: int, count: int = 40) -> list[Arrival]:
    lengths = draw_lengths(SHAREGPT, count, seed, context=1024)
    return synthetic(arrival_times(count, 40.0, seed=seed), lengths)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([70, 100, 1000]), st.sampled_from(sorted(POLICIES)))
def test_every_request_ends_once_with_all_its_tokens(seed: int, num_blocks: int, policy: str) -> None:
    arrivals = [a._replace(tenant="ab"[i % 2], priority=i % 3) for i, a in enumerate(mixed(seed))]
    simulation = Simulation(
        scheduler(LINEAR, num_blocks=num_blocks, max_model_len=1024, policy=policy), arrivals, LINEAR
    )
    ended: list[str] = []
    before = 0.0
    for step in simulation.steps():
        simulation.scheduler.check()
        ended += [chunk.request_id for chunk in step.chunks if chunk.finish_reason]
        assert before <= step.start < step.end == simulation.now
        before = step.end
    assert sorted(ended, key=int) == [str(i) for i in range(len(arrivals))]
    for outcome in simulation.outcomes:
        assert outcome.finish == "length"
        assert outcome.num_tokens == outcome.arrival.output_len
        assert outcome.arrival.time <= outcome.first_scheduled < outcome.first_token <= outcome.end
        assert outcome.first_token + sum(outcome.gaps) == pytest.approx(outcome.end)
    assert not simulation.scheduler.has_work
    assert simulation.scheduler.pool.num_used == 0
    generated = sum(arrival.output_len for arrival in arrivals)
    assert simulation.scheduler.counters.generated_tokens == generated


def test_a_gap_spans_a_preemption() -> None:
    arrivals = [Arrival(0.0, 300, 300), Arrival(0.1, 300, 300)]
    cramped = scheduler(LINEAR, num_blocks=60, max_model_len=640)
    outcomes = simulate(cramped, arrivals, LINEAR)
    assert cramped.counters.preemptions > 0
    # Whoever was thrown back waited for the other to end, and then computed everything again.
    assert max(max(outcome.gaps) for outcome in outcomes) > 100 * LINEAR.base


def test_runs_are_a_function_of_the_seed() -> None:
    def play(noise: float, seed: int) -> list[list[float]]:
        return [list(o.gaps) for o in simulate(scheduler(LINEAR), mixed(1), LINEAR, noise=noise, seed=seed)]

    assert play(0.0, 1) == play(0.0, 2)
    assert play(0.2, 1) == play(0.2, 1) != play(0.2, 2)


def test_noise_has_the_given_spread_and_median_one() -> None:
    (outcome,) = simulate(scheduler(CONSTANT), [Arrival(0.0, 4, 2000)], CONSTANT, noise=0.3, seed=1)
    assert statistics.median(outcome.gaps) == pytest.approx(1.0, abs=0.03)
    quartiles = statistics.quantiles(outcome.gaps, n=4)
    assert quartiles[2] / quartiles[0] == pytest.approx(2.718281828 ** (2 * 0.6745 * 0.3), rel=0.05)


def test_the_steps_time_model_learns_the_truth_from_a_wrong_start() -> None:
    guess = StepCost(LINEAR.tile, 0.02, 0.0001, 0.0, 0.0)
    learner = scheduler(guess)
    simulate(learner, mixed(3, 200), LINEAR)
    assert learner.steps.cost.base + learner.steps.cost.per_tile == pytest.approx(0.003, rel=0.2)
    assert learner.steps.error < 0.05


def test_what_could_never_run_is_refused_and_the_rest_is_served() -> None:
    arrivals = [Arrival(0.0, 5000, 3), Arrival(0.0, 10, 3)]
    refused, served = simulate(scheduler(LINEAR), arrivals, LINEAR)
    assert (refused.finish, refused.first_scheduled, refused.num_tokens) == ("refused", NEVER, 0)
    assert served.finish == "length"


def test_later_turns_find_the_earlier_ones_in_the_cache() -> None:
    arrivals = conversations([0.0, 0.5, 1.0], LengthLaw((60, 200), (30, 60), 2000), turns=5, think=60.0, seed=4)
    outcomes = simulate(scheduler(LINEAR, prefix_caching=True), arrivals, LINEAR)
    later = [(before, after) for before in outcomes for after in outcomes if follows(before.arrival, after.arrival)]
    assert len(later) >= 3
    for before, after in later:
        known = before.arrival.prompt_len + before.arrival.output_len - 1  # the last token drawn was never computed
        assert after.num_cached == known // 16 * 16
    assert all(outcome.num_cached == 0 for outcome in outcomes if outcome.arrival.turn == 0)


def follows(before: Arrival, after: Arrival) -> bool:
    return before.session == after.session and after.turn == before.turn + 1


def test_delays_count_those_who_still_wait() -> None:
    arrivals = [Arrival(0.0, 10, 10), Arrival(1.5, 10, 10), Arrival(50.0, 10, 1)]
    simulation = Simulation(scheduler(CONSTANT, max_num_seqs=1), arrivals, CONSTANT)
    for step in simulation.steps():
        if step.end == 5.0:
            assert list(simulation.delays()) == [0.0, 3.5]
    assert list(simulation.delays()) == [0.0, 8.5, 0.0]


def test_a_scheduler_that_stands_still_is_found() -> None:
    class Idle(Scheduler):
        def _fill(self, plan: Any, rows: Any, now: float) -> None:
            pass

    idle = Idle(scheduler(CONSTANT).config, CONSTANT)
    with pytest.raises(RuntimeError, match="1 requests wait"):
        simulate(idle, [Arrival(0.0, 4, 4)], CONSTANT)


# Three machines: one whose rows are free, one that computes sixteen for the price of one, one that pays for each.
MACHINES = [
    StepCost(64, 0.010, 0.0005, 1e-8, 1e-9),
    StepCost(16, 0.020, 0.0040, 1e-7, 1e-8),
    StepCost(1, 0.001, 0.0010, 1e-7, 1e-8),
]


def tokens_per_second(cost: StepCost, streams: int, guessing: Guessing, **changed: Any) -> float:
    """While the house is full: what comes after says who happened to end last."""
    arrivals = [Arrival(0.0, 40, 300)] * (streams + 4)
    busy = scheduler(cost, max_num_seqs=streams, num_blocks=4000, **changed)
    simulation = Simulation(busy, arrivals, cost, guessing=guessing, seed=3)
    for _ in simulation.steps():
        if not busy.num_waiting and len(busy.running) < streams:
            break
    return busy.counters.generated_tokens / simulation.now


@pytest.mark.parametrize("cost", MACHINES)
@pytest.mark.parametrize("streams", [1, 6, 24])
@pytest.mark.parametrize("acceptance", [(0.0,), (0.4,), (0.9,), (0.1, 0.95)])
def test_guessing_never_slows_a_full_house(cost: StepCost, streams: int, acceptance: tuple[float, ...]) -> None:
    """Whatever it costs, and though nobody knows at first: all of it together loses less than a hundredth."""
    guessing = Guessing(acceptance, 0.05 * cost.base, 0.01 * cost.base, 0.02 * cost.base, 0.001 * cost.base)
    drafts = {"draft_method": "draft", "draft_shape": parse_shape("chain:4", 0)}
    without = tokens_per_second(cost, streams, guessing)
    adaptive = tokens_per_second(cost, streams, guessing, **drafts)
    assert adaptive >= 0.99 * without
    if streams == 1 and acceptance == (0.9,) and cost.base > cost.per_tile:
        assert adaptive >= 2.0 * without
    if streams == 24 and acceptance == (0.0,):
        assert tokens_per_second(cost, streams, guessing, adaptive_drafts=False, **drafts) < 0.9 * without


def test_accepted_tokens_are_counted_once_each() -> None:
    drafts = {"draft_method": "draft", "draft_shape": parse_shape("rsd-s:2x3", 0), "adaptive_drafts": False}
    guesser = scheduler(CONSTANT, **drafts)
    (outcome,) = simulate(guesser, [Arrival(0.0, 10, 41)], CONSTANT, guessing=Guessing((1.0,)))
    assert (outcome.num_tokens, outcome.end) == (41, 11.0)  # the prompt's step draws one, every other step four
    assert sorted(outcome.gaps) == [0.0] * 30 + [1.0] * 10
    assert guesser.counters.accepted_at == [10, 10, 10]
    assert (guesser.counters.drafted, guesser.counters.accepted) == (60, 30)
