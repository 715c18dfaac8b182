"""Replicas by queue depth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.deploy.ray.autoscaling import FULL, Load, queue_policy, wanted

LOADS = st.lists(st.builds(Load, st.integers(0, 64), st.integers(0, 500), st.integers(1, 64)), min_size=1, max_size=8)


def test_a_fleet_without_work_wants_none_and_a_full_one_as_many_as_fill_it() -> None:
    assert wanted([Load(0, 0, 64)]) == 0
    assert wanted([Load(FULL * 64, 0, 64)] * 3) == pytest.approx(3)
    assert wanted([Load(64, 64, 64)]) == pytest.approx(2 / FULL)


@given(LOADS, st.integers(0, 100), st.integers(1, 100))
def test_more_work_never_wants_fewer(loads: list[Load], queued: int, more: int) -> None:
    assert wanted(loads, queued + more) > wanted(loads, queued)
    busier = [loads[0]._replace(waiting=loads[0].waiting + more), *loads[1:]]
    assert wanted(busier, queued) > wanted(loads, queued)


def context(told: Any, queued: float = 0.0) -> Any:
    return SimpleNamespace(aggregated_metrics=told, total_queued_requests=queued, target_num_replicas=3)


def test_the_policy_reads_what_replicas_tell() -> None:
    told = {"running": {"a": 8, "b": 8}, "waiting": {"a": 16, "b": 0}, "places": {"a": 8, "b": 8}, "other": {"a": 1}}
    assert queue_policy(context(told))[0] == pytest.approx(32 / (FULL * 8))
    assert queue_policy(context(told, queued=8))[0] == pytest.approx(40 / (FULL * 8))


@pytest.mark.parametrize("told", [None, {}, {"running": {"a": 1}}, {"running": {"a": 1}, "waiting": {}, "places": {}}])
def test_as_long_as_nobody_has_told_nothing_changes(told: Any) -> None:
    assert queue_policy(context(told)) == (3, {})
