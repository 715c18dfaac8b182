"""Finding out again: the controller played against a world that deceives it at first."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest

from quire.scheduler import speculation
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.draft_cost import DraftCost, TwoTerms, rows_by_level
from quire.scheduler.drafts import DraftOrder, parse_shape
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import DraftPass, RowResult
from quire.scheduler.request import Group, Request
from quire.scheduler.speculation import Speculation, Wish
from quire.scheduler.step_time import StepCost, StepShape, StepTimeModel

COST = StepCost(tile=16, base=0.025, per_tile=0.010, per_context=0.0, per_pair=0.0)
PER_LEVEL, PER_NODE = 0.003, 0.001
PARAMS = SamplingParams(max_tokens=200)
REQUEST_TOKENS = 96  # then another one comes


class Played(NamedTuple):
    """idle: share of decisions for nothing; speed: tokens per second over those without guesses."""

    idle: float
    speed: float


def controller(shape: str, prior: StepCost = COST) -> Speculation:
    config = SchedulerConfig(
        num_blocks=400,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        max_model_len=1024,
        draft_method="draft",
        draft_shape=parse_shape(shape, 0),
    )
    return Speculation(config, StepTimeModel(prior))


def new_request() -> Request:
    return Request(Group("r", [1] * 50, PARAMS, 0, 250, 0.0), 0, [1] * 50, (0.0, 0), PARAMS, 50)


def play(
    shape: str,
    steps: int,
    acceptance: Callable[[int], float],
    *,
    slow: Callable[[int], float] = lambda step: 1.0,
    streams: int = 1,
    prior: StepCost = COST,
) -> Played:
    """acceptance: by step; slow: how much longer than it should a step is measured to be, all its parts."""
    control, draw, full = controller(shape, prior), random.Random(5), parse_shape(shape, 0)
    requests, left = [new_request() for _ in range(streams)], [REQUEST_TOKENS] * streams
    idle, tokens, seconds, plain = 0, 0, 0.0, StepShape(streams, 50 * streams)
    for step in range(steps):
        wishes = [Wish(request, DraftOrder("draft", full)) for request in requests]
        depths = [0] * streams if control.rests() else control.choose(wishes, plain, 400, math.inf)
        orders = [DraftOrder("draft", full.cut(depth)) for depth in depths if depth]
        taken = plain
        for order in orders:
            taken = taken.guessing(49, order.shape.nodes)
        nodes = taken.num_tokens - streams
        verify, guess = COST.seconds(taken) + PER_NODE * nodes, PER_LEVEL * max(depths)
        if orders:
            rows = sum(sum(rows_by_level(order)) for order in orders)
            control.guessed(DraftPass("draft", max(depths), rows, guess * slow(step)), len(orders))
        control.observe(taken, nodes, verify * slow(step))
        for i, depth in enumerate(depths):
            accepted = 0
            while accepted < depth and draw.random() < acceptance(step):
                accepted += 1
            if depth:
                got = RowResult([0] * (accepted + 1), drafted=full.cut(depth).nodes, draft_depth=depth)
                control.learn(requests[i], "draft", got)
            left[i] -= 1 + accepted
            if left[i] <= 0:
                requests[i], left[i] = new_request(), REQUEST_TOKENS
            tokens += 1 + accepted
            idle += not depth
        seconds += verify + guess
    return Played(idle / (steps * streams), tokens / seconds / (streams / COST.seconds(plain)))


def good(step: int) -> float:
    return 0.85


def never(step: int) -> float:
    return 0.0


SHAPES = ["chain:8", "rsd-s:3x6"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_machine_that_is_busy_at_first_is_not_taken_for_a_slow_one(shape: str, monkeypatch: pytest.MonkeyPatch):
    def slow(step: int) -> float:
        return 10.0 if 0 < step < 4 else 1.0

    undisturbed, held_up = play(shape, 400, good), play(shape, 400, good, slow=slow)
    assert undisturbed.idle < 0.02
    assert held_up.idle < 0.06
    assert held_up.speed > 0.95 * undisturbed.speed
    # Errors in seconds, and probes only when they are saved up for: nothing is guessed for hundreds of steps.
    observe = TwoTerms.observe
    monkeypatch.setattr(TwoTerms, "observe", lambda self, x, y, seconds, whole: observe(self, x, y, seconds, 1.0))
    monkeypatch.setattr(speculation, "FREE_PROBES", 0)
    assert play(shape, 400, good, slow=slow).idle > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_now_and_then_a_step_that_is_held_up_changes_little(shape: str):
    held_up = play(shape, 400, good, slow=lambda step: 4.0 if step % 10 == 2 else 1.0)
    assert held_up.speed > 0.95 * play(shape, 400, good).speed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bad_steps", "idle"), [(15, 0.1), (60, 0.25)])
def test_guesses_that_were_wrong_at_first_are_tried_again(shape: str, bad_steps: int, idle: float):
    assert play(shape, 400, lambda step: 0.85 if step >= bad_steps else 0.0).idle < idle


@pytest.mark.parametrize("streams", [1, 4, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_probes_lose_is_bounded(shape: str, streams: int):
    """And with it, what is lost by not knowing at first."""
    assert play(shape, 1500, never, streams=streams).speed > 0.99


@pytest.mark.parametrize("acceptance", [0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("streams", [1, 32])
def test_guesses_that_hardly_pay_lose_nothing_more(streams: int, acceptance: float):
    assert play("chain:8", 1500, lambda step: acceptance, streams=streams).speed > 0.99


def test_what_was_seen_is_judged_anew_when_the_model_of_steps_learns():
    """Steps take twice what was believed; at first that looks like the price of verifying."""
    half = StepCost(COST.tile, COST.base / 2, COST.per_tile / 2, 0.0, 0.0)
    control = controller("chain:4", half)
    shape = StepShape(1, 50)
    for nodes in (1, 2, 3, 4) * 3:
        guessing = shape.guessing(49, nodes)
        control.observe(guessing, nodes, COST.seconds(guessing))
    assert control.cost.verifying.a == pytest.approx(COST.seconds(shape) / 2, rel=0.05)
    for _ in range(64):
        control.observe(shape, 0, COST.seconds(shape))
    assert control.cost.verifying.a == pytest.approx(0.0, abs=1e-6)


def test_rows_of_catching_up_are_not_booked_on_levels():
    cost = DraftCost()
    missed = DraftPass("draft", 4, 200 + 4, 4 * 0.002 + 200 * 0.0005, caught_up=200)
    assert cost.guessed(missed, 1) > 0.0
    assert not cost.is_known("draft"), "of a level nothing has been seen"
    for _ in range(3):
        assert cost.guessed(DraftPass("draft", 4, 4, 4 * 0.002), 1) == 0.0
    assert cost.is_known("draft")
    for _ in range(20):
        cost.guessed(missed, 1)
    assert cost.of("draft").a == pytest.approx(0.002, rel=0.01)
    assert cost.guessed(missed, 1) == pytest.approx(0.1, rel=0.1)


def test_what_a_proposer_caught_up_with_is_lost_with_a_probe():
    """Probes of streams of which it has missed a whole prompt are rarer by what that takes."""

    def probes(caught_up: int) -> int:
        control, request = controller("chain:4"), new_request()
        control.cost._times["draft"] = 2
        control.cost.of("draft").a = 0.003
        for _ in range(1000):
            control.learn(request, "draft", RowResult([0], draft_depth=4))
        count = 0
        for _ in range(3000):
            wishes = [Wish(request, DraftOrder("draft", parse_shape("chain:4", 0)))]
            (depth,) = control.choose(wishes, StepShape(1, 50), 400, math.inf)
            if depth:
                count += 1
                control.guessed(DraftPass("draft", 1, 1 + caught_up, 0.003 + 0.0001 * caught_up, caught_up), 1)
                control.learn(request, "draft", RowResult([0], drafted=1, draft_depth=1))
        return count

    assert 5 * (probes(400) - speculation.FREE_PROBES) < probes(0) - speculation.FREE_PROBES
