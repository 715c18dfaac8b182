"""The verdict on a sample, and its tail."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.params import Slo
from quire.server.promises import SampleClock, tail, verdict

ALL = Slo(ttft=1.0, itl=0.1, deadline=10.0)


def clock(first=10.5, heard=15.0, gaps=(0.05, 0.1)):
    return SampleClock(first, heard, heard, list(gaps))


@pytest.mark.parametrize(
    ("sample", "finished", "kept"),
    [
        (clock(), True, (True, True, True)),
        (clock(first=11.0, heard=20.0, gaps=(0.1,)), True, (True, True, True)),  # the bounds are inside
        (clock(first=11.01), True, (False, True, True)),
        (clock(gaps=(0.05, 0.11)), True, (True, False, True)),
        (clock(heard=20.01), True, (True, True, False)),
        (clock(), False, (True, True, False)),  # out of time: no deadline is kept
        (clock(gaps=()), True, (True, True, True)),  # a single token
        (SampleClock(heard=10.5), True, (True, True, True)),  # ended without one
        (SampleClock(heard=11.5), True, (False, True, True)),
        (SampleClock(), False, (False, False, False)),  # never heard of
        (SampleClock(heard=10.2), False, (False, False, False)),  # ended in the queue
    ],
)
def test_verdicts(sample, finished, kept):
    assert verdict(ALL, 10.0, sample, finished=finished) == dict(zip(("ttft", "itl", "deadline"), kept, strict=True))


def test_only_what_was_asked_is_judged():
    assert verdict(Slo(), 10.0, clock(), finished=True) == {}
    assert verdict(Slo(itl=1.0), 10.0, clock(), finished=True) == {"itl": True}


@given(st.lists(st.floats(0, 10), min_size=1, max_size=500))
def test_the_tail_is_the_nearest_rank_and_the_longest_of_few(gaps):
    value = tail(gaps)
    if len(gaps) < 100:
        assert value == max(gaps)
    else:
        assert sum(gap <= value for gap in gaps) >= 0.99 * len(gaps)
        assert sum(gap < value for gap in gaps) < 0.99 * len(gaps)


def test_one_hiccup_in_hundred_is_forgiven_and_two_are_not():
    assert tail([0.1] * 99 + [math.inf]) == 0.1
    assert tail([0.1] * 98 + [math.inf] * 2) == math.inf
    assert tail([0.1] * 98 + [math.inf]) == math.inf  # 99 gaps: the longest counts
