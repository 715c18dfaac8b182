"""Packing: nothing is lost or doubled, rows are as few as best fit promises, and nobody is passed over for ever."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.budget import Budget
from quire.scheduler.packing import PASSED_OVER, Want, pack, pack_rows
from quire.scheduler.step_time import StepCost, StepShape

COST = StepCost(tile=1, base=1e-3, per_tile=1e-4, per_context=1e-7, per_pair=1e-8)


def budget(tokens: int, seconds: float = math.inf) -> Budget:
    return Budget(COST, StepShape(), tokens, seconds, 1)


wants = st.lists(st.builds(Want, st.integers(0, 100), st.integers(1, 80), st.integers(0, PASSED_OVER)), max_size=12)


@given(wants, st.integers(0, 200))
def test_the_budget_is_kept_and_used_up(items, tokens):
    packed = pack(items, budget(tokens))
    indices = [i for i, _ in packed.chosen]
    assert indices == sorted(set(indices))
    assert all(1 <= count <= items[i].tokens for i, count in packed.chosen)
    used = sum(count for _, count in packed.chosen)
    assert used == min(tokens, sum(item.tokens for item in items))
    assert sum(count < items[i].tokens for i, count in packed.chosen) <= 1, "more than one is cut"


@given(wants, st.integers(1, 200))
def test_who_was_passed_over_often_enough_is_not_again(items, tokens):
    packed = pack(items, budget(tokens))
    for i in packed.passed_over:
        assert items[i].passed_over < PASSED_OVER
        assert items[i].tokens <= tokens, "longer than a step: waiting would not save a cut"


def test_whole_ones_that_fit_come_before_a_cut():
    packed = pack([Want(0, 60), Want(0, 50), Want(0, 30), Want(0, 40)], budget(100))
    assert packed.chosen == [(0, 60), (3, 40)]
    assert packed.passed_over == [1]
    patient = pack([Want(0, 60), Want(0, 50, PASSED_OVER), Want(0, 30), Want(0, 40)], budget(100))
    assert patient.chosen == [(0, 60), (1, 40)]


def test_a_prompt_longer_than_a_step_is_cut_at_its_turn():
    assert pack([Want(0, 300), Want(0, 10)], budget(100)).chosen == [(0, 100)]


def test_pairs_count_beside_tokens():
    """Two chunks of one length: behind a long context less of it fits the same time."""
    seconds = COST.seconds(StepShape().plus(0, 50))
    ((_, near),) = pack([Want(0, 50)], budget(100, seconds)).chosen
    ((_, far),) = pack([Want(10_000, 50)], budget(100, seconds)).chosen
    assert far < near == 50


@given(st.lists(st.integers(1, 64), max_size=40), st.integers(64, 100))
def test_rows_hold_every_prompt_once_and_never_overlap(lengths, width):
    rows = pack_rows(lengths, width)
    assert sorted(s.prompt for row in rows for s in row) == list(range(len(lengths)))
    for row in rows:
        end = 0
        for segment in row:
            assert segment.start == end
            assert segment.length == lengths[segment.prompt]
            end += segment.length
        assert end <= width
    least = -(-sum(lengths) // width)
    assert len(rows) <= 11 / 9 * max(least, 1) * 2  # of the volume bound, which the optimum may miss by a factor of two
    assert all(sum(s.length for s in a) + sum(s.length for s in b) > width for a in rows for b in rows if a is not b)


@pytest.mark.parametrize("lengths", [[0], [5, 11], [-1]])
def test_what_fits_no_row_is_refused_by_name(lengths):
    with pytest.raises(ValueError, match=f"prompt {len(lengths) - 1} has {lengths[-1]} tokens"):
        pack_rows(lengths, 10)
