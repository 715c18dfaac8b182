"""The step-time model finds the coefficients behind noisy steps, and forgets nothing that it needs."""

from __future__ import annotations

import random

import pytest

from quire.scheduler.step_time import (
    BUCKETS,
    LEAST_MARGIN,
    MOST_MARGIN,
    StepCost,
    StepShape,
    StepTimeModel,
    ideal_seconds,
    shape_of,
)

TRUE = StepCost(tile=16, base=2e-3, per_tile=3e-4, per_context=2e-7, per_pair=5e-9)
GUESS = StepCost(tile=16, base=1e-3, per_tile=1e-3, per_context=0.0, per_pair=0.0)


def steps(rng: random.Random, count: int):
    for _ in range(count):
        rows = [(rng.randrange(2000), 1) for _ in range(rng.randrange(0, 40))]
        if rng.random() < 0.4 or not rows:
            rows.append((rng.randrange(2000), rng.randrange(2, 400)))
        yield shape_of(rows)


def taught(noise: float, outliers: float, seed: int) -> StepTimeModel:
    rng = random.Random(seed)
    model = StepTimeModel(GUESS)
    for shape in steps(rng, 2000):
        seconds = TRUE.seconds(shape) * rng.lognormvariate(0, noise)
        model.observe(shape, seconds * (20 if rng.random() < outliers else 1))
    return model


def test_shape_counts_decodes_by_context_and_chunks_by_pairs():
    assert shape_of([(99, 1), (0, 10), (10, 10)]) == StepShape(21, 100, 10 * 5 + 10 * 15)
    assert shape_of([(99, 1)]).plus(0, 10) == shape_of([(0, 10), (99, 1)])
    assert TRUE.seconds(StepShape()) == 0
    assert TRUE.seconds(shape_of([(0, 16)])) - TRUE.seconds(shape_of([(0, 17)])) < -TRUE.per_tile
    assert [TRUE.launched(n) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]


@pytest.mark.parametrize("outliers", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_coefficients_are_found_through_noise_and_outliers(outliers: float, seed: int):
    model = taught(0.05, outliers, seed)
    rng = random.Random(100 + seed)
    errors = [abs(model.cost.seconds(shape) / TRUE.seconds(shape) - 1) for shape in steps(rng, 300)]
    assert sum(errors) / len(errors) < 0.03
    assert max(errors) < 0.15
    assert model.cost.per_context == pytest.approx(TRUE.per_context, rel=0.3)
    assert model.cost.per_tile == pytest.approx(TRUE.per_tile, rel=0.2)


def test_a_mean_instead_of_the_median_would_not_survive_the_outliers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("quire.scheduler.step_time.median", lambda values: sum(v := list(values)) / len(v))
    model = taught(0.05, 0.1, 0)
    rng = random.Random(100)
    errors = [abs(model.cost.seconds(shape) / TRUE.seconds(shape) - 1) for shape in steps(rng, 300)]
    assert sum(errors) / len(errors) > 0.03


def test_what_is_rarely_seen_is_not_forgotten():
    model = taught(0.0, 0.0, 0)
    before = model.cost
    for i in range(5000):  # a long time of nothing but decodes
        shape = shape_of([(500 + i % 50, 1)] * 8)
        model.observe(shape, TRUE.seconds(shape))
    assert model.cost.per_pair == pytest.approx(before.per_pair, rel=0.05)
    assert len(model._buckets) <= BUCKETS


def test_coefficients_are_never_negative():
    model = StepTimeModel(GUESS)
    for tokens in range(16, 512, 16):
        model.observe(shape_of([(0, tokens)]), 0.05 - tokens * 1e-5)  # larger steps are faster: nonsense
    model.fit()
    assert min(model.cost) >= 0


def test_the_margin_is_what_one_step_in_twenty_exceeds():
    calm, wild = taught(0.005, 0.0, 0), taught(0.3, 0.0, 0)
    assert LEAST_MARGIN <= calm.margin < 1.1 < wild.margin <= MOST_MARGIN
    assert calm.error < 0.05 < wild.error


def test_nonsense_is_not_learned_from():
    model = StepTimeModel(GUESS)
    model.observe(StepShape(), 1.0)
    model.observe(shape_of([(0, 5)]), 0.0)
    model.observe(shape_of([(0, 5)]), -1.0)
    model.fit()
    assert model.cost == GUESS


def test_ideal_time_is_the_prompt_in_chunks_and_then_token_by_token():
    cost = StepCost(1, 1.0, 0.1, 0.0, 0.0)
    assert ideal_seconds(cost, 100, 1, 100) == pytest.approx(1 + 10)
    assert ideal_seconds(cost, 100, 1, 50) == pytest.approx(2 + 10)
    assert ideal_seconds(cost, 100, 11, 100) == pytest.approx(11 + 10 * 1.1)
    assert ideal_seconds(cost, 100, 0, 100) == ideal_seconds(cost, 100, 1, 100)
