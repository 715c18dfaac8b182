from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from quire.scheduler.traces import arrival_times


def gaps(burstiness: float, count: int = 20_000) -> np.ndarray:
    return np.diff(arrival_times(count, rate=4.0, burstiness=burstiness, seed=1))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_mean_rate_and_spread_are_as_asked(burstiness: float) -> None:
    g = gaps(burstiness)
    assert g.mean() == pytest.approx(0.25, rel=0.05)
    assert g.std() / g.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_burstiness_one_is_the_poisson_process_and_others_are_not() -> None:
    assert stats.kstest(gaps(1.0), stats.expon(scale=0.25).cdf).pvalue > 1e-3
    assert stats.kstest(gaps(4.0), stats.expon(scale=0.25).cdf).pvalue < 1e-6


def test_seeded_ordered_and_from_zero() -> None:
    times = arrival_times(100, 10.0, seed=3)
    assert times == arrival_times(100, 10.0, seed=3)
    assert times != arrival_times(100, 10.0, seed=4)
    assert times[0] == 0
    assert times == sorted(times)


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (1, 0), (float("nan"), 1)])
def test_impossible_rates_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        arrival_times(3, rate, burstiness)
