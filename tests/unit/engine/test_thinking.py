"""Where thinking begins and ends, and when its end is forced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.thinking import Outlook, ThinkingState
from quire.scheduler.params import Thinking

START, END = (7,), (1, 2, 1, 3)


def thinking(**fields) -> Thinking:
    return Thinking(**{"start_ids": START, "end_ids": END, **fields})


def forced(state: ThinkingState) -> int | None:
    return state.after(()).forced


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_forces_the_whole_end_once_it_is_spent(budget):
    state = ThinkingState(thinking(opened=True, budget=budget))
    for _ in range(budget):
        assert forced(state) is None
        state.append(9)
    for token in END:
        assert forced(state) == token
        assert state.append(token) == ()
    assert state.after(()) == Outlook(None, (), opens=False)
    assert state.append(9) == (9,)


def test_an_end_that_has_begun_is_completed_and_not_doubled():
    state = ThinkingState(thinking(opened=True, budget=3))
    state.extend([9, 1, 2])
    assert [forced(state), state.append(1), forced(state), state.append(3)] == [1, (), 3, ()]
    assert state.after(()).answer == ()


def test_an_end_that_only_seemed_to_begin_goes_on_being_looked_for():
    state = ThinkingState(thinking(opened=True))
    assert state.extend([1, 2, 1, 2, 1, 3, 5]) == [5]


def test_thinking_that_is_never_opened_is_the_answer():
    state = ThinkingState(thinking(budget=0))
    assert state.after(()) == Outlook(None, (), opens=True)
    assert state.append(9) == (9,)
    assert state.append(7) == (7,)
    assert forced(state) is None


def test_a_start_that_is_drawn_counts_for_nothing():
    state = ThinkingState(thinking(budget=1))
    state.append(7)
    assert forced(state) is None
    state.append(9)
    assert forced(state) == 1


def test_a_start_in_parts_is_the_answers_if_it_breaks_off():
    parts = thinking(start_ids=(7, 8, 9))
    free, constrained = ThinkingState(parts), ThinkingState(parts, constrained=True)
    assert free.append(7) == constrained.append(7) == ()
    assert forced(free) is None
    assert forced(constrained) == 8
    assert free.append(5) == (7, 5)


@given(
    drawn=st.lists(st.sampled_from([1, 2, 3, 7, 9]), max_size=12),
    cut=st.integers(0, 12),
    opened=st.booleans(),
    budget=st.none() | st.integers(0, 4),
)
def test_a_path_is_seen_as_if_it_had_been_drawn(drawn, cut, opened, budget):
    whole, behind = (ThinkingState(thinking(opened=opened, budget=budget)) for _ in range(2))
    said = whole.extend(drawn)
    before = behind.extend(drawn[:cut])
    outlook = behind.after(drawn[cut:])
    assert outlook._replace(answer=None) == whole.after(())._replace(answer=None)
    assert (outlook.answer is None) == (whole.after(()).answer is None)
    if outlook.answer is not None:
        assert before + list(outlook.answer) == said
