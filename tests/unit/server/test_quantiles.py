"""Percentiles of a window are those of what was observed in it, as far as buckets tell."""

from __future__ import annotations

import random
from statistics import quantiles as exact

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.metrics import ITL_BUCKETS
from quire.server.quantiles import Window, quantile
from quire.server.tally import TallyHistogram


def counts_of(values: list[float]) -> list[int]:
    histogram = TallyHistogram("a_seconds", "What.", "model_name", "m", ITL_BUCKETS)
    for value in values:
        histogram.observe(value)
    return histogram.counts


def test_linear_inside_a_bucket() -> None:
    assert quantile((1.0, 2.0), [0, 10, 0], 0.5) == pytest.approx(1.5)
    assert quantile((1.0, 2.0), [10, 10, 0], 0.5) == pytest.approx(1.0)
    assert quantile((1.0, 2.0), [0, 0, 3], 0.5) == 2.0
    assert quantile((1.0, 2.0), [0, 0, 0], 0.5) is None


@given(st.lists(st.floats(0.0001, 70.0), min_size=1), st.sampled_from([0.5, 0.9, 0.99]))
def test_in_the_bucket_of_the_true_one(values: list[float], q: float) -> None:
    found = quantile(ITL_BUCKETS, counts_of(values), q)
    true = sorted(values)[max(0, -(-int(q * 1000) * len(values) // 1000) - 1)]
    bounds = (0.0, *ITL_BUCKETS)
    i = next(i for i in range(1, len(bounds)) if bounds[i] >= true)
    assert found is not None
    assert bounds[i - 1] <= found <= bounds[i]


def test_near_the_exact_ones() -> None:
    draw = random.Random(5)
    values = [draw.lognormvariate(-4, 0.5) for _ in range(5000)]
    cuts = exact(values, n=100)
    for percent in (50, 90, 99):
        assert quantile(ITL_BUCKETS, counts_of(values), percent / 100) == pytest.approx(cuts[percent - 1], rel=0.25)


def test_a_window_forgets() -> None:
    window, counts = Window(10.0, 1.0), [0, 0]
    for second in range(30):
        counts[second >= 15] += 1
        latest = window.since(float(second), counts)
        assert sum(latest) <= 10
    assert latest == [0, 10]
    assert window.since(100.0, counts) == [0, 0], "after a pause it begins anew"
