from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.coverage import coverage, difficulty, fit_power_law, ladder, pass_at_k


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case: tuple[int, int, int]) -> None:
    samples, right, k = case
    subsets = list(combinations(range(samples), k))
    hit = sum(any(i < right for i in subset) for subset in subsets)
    assert pass_at_k(samples, right, k) == pytest.approx(hit / len(subsets), abs=1e-12)


def test_the_obvious_estimate_is_biased_and_this_one_is_not() -> None:
    """Over many tasks of one p: the mean tends to 1 - (1 - p)^k, which plugging in the observed share misses."""
    draw, p, samples, k = random.Random(0), 0.1, 10, 5
    rights = [sum(draw.random() < p for _ in range(samples)) for _ in range(20_000)]
    truth = 1 - (1 - p) ** k
    assert coverage([(samples, right) for right in rights], k) == pytest.approx(truth, abs=0.01)
    plugged = sum(1 - (1 - right / samples) ** k for right in rights) / len(rights)
    assert abs(plugged - truth) > 0.02


def test_it_stays_exact_where_binomials_overflow_floats() -> None:
    exact = 1 - math.comb(9_990, 1_000) / math.comb(10_000, 1_000)
    assert pass_at_k(10_000, 10, 1_000) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_what_cannot_be_is_refused(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match=str(samples)):
        pass_at_k(samples, right, k)


@given(st.floats(-4, -0.1), st.floats(-0.9, -0.05))
def test_a_power_law_is_recovered(a: float, b: float) -> None:
    fitted = fit_power_law([(k, math.exp(a * k**b)) for k in ladder(1000)])
    assert fitted is not None
    assert (fitted.a, fitted.b) == (pytest.approx(a, rel=1e-6), pytest.approx(b, rel=1e-6))
    assert fitted.r2 == pytest.approx(1)
    assert fitted.coverage(64) == pytest.approx(math.exp(a * 64**b))


def test_a_single_task_follows_no_power_law() -> None:
    """The exponential 1 - (1 - p)^k bends in the plane where power laws are straight."""
    fitted = fit_power_law([(k, 1 - 0.9**k) for k in ladder(50)])
    assert fitted is not None
    assert fitted.r2 < 0.97


def test_points_without_a_logarithm_are_left_out() -> None:
    assert fit_power_law([(1, 0.0), (2, 0.5), (5, 1.0)]) is None
    assert fit_power_law([]) is None


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (7, [1, 2, 5, 7]), (100, [1, 2, 5, 10, 20, 50, 100])])
def test_the_ladder_ends_at_the_top(most: int, expected: list[int]) -> None:
    assert ladder(most) == expected


def test_difficulty_tells_the_tails() -> None:
    d = difficulty([(10, 0)] * 5 + [(10, 1)] * 3 + [(10, 10)] * 2)
    assert (d.never, d.always, d.p10, d.p50, d.p90) == (0.5, 0.2, 0.0, 0.0, 1.0)
