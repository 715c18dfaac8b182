"""What a step may take in: the largest chunk that keeps the promise, by brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.budget import BLOCK_END, Budget, equal_time_seconds
from quire.scheduler.step_time import StepCost, StepShape, shape_of

COST = StepCost(tile=16, base=1e-3, per_tile=1e-3, per_context=1e-6, per_pair=1e-7)

decodes = st.lists(st.integers(0, 500), max_size=40).map(lambda contexts: shape_of((c, 1) for c in contexts))


@given(decodes, st.integers(0, 400), st.floats(0.001, 0.2), st.integers(0, 3000), st.integers(1, 600))
def test_a_chunk_is_the_longest_that_is_predicted_in_time(shape, tokens, seconds, start, wanted):
    budget = Budget(COST, shape, tokens, seconds, 1)
    count = budget.chunk(start, wanted)
    most = min(wanted, tokens)
    assert 0 <= count <= most
    in_time = [n for n in range(1, most + 1) if COST.seconds(shape.plus(start, n)) <= seconds]
    least = min(most, 16 - shape.num_tokens % 16)
    if count > least:
        assert COST.seconds(shape.plus(start, count)) <= seconds
    if count < wanted:  # cut: less than a tile below the longest
        assert count > max([least, *in_time]) - 16
    if in_time and in_time[-1] == wanted:
        assert count == wanted


@given(decodes, st.integers(1, 400), st.integers(0, 3000), st.integers(1, 600))
def test_some_prompt_moves_on_however_tight_the_promise(shape, tokens, start, wanted):
    assert Budget(COST, shape, tokens, 1e-6, 1).chunk(start, wanted) >= 1


@given(decodes, st.integers(1, 400), st.integers(0, 3000), st.integers(1, 600), st.integers(1, 64))
def test_a_cut_ends_a_tile_or_nearly_there_a_block(shape, tokens, start, wanted, block):
    count = Budget(COST, shape, tokens, math.inf, block).chunk(start, wanted)
    if 16 < count < wanted:
        full_tile = (shape.num_tokens + count) % 16 == 0
        full_block = (start + count) % block == 0
        assert full_tile or full_block
        over = (start + count) % block
        assert full_block or over > count * BLOCK_END


def test_what_is_spent_is_gone():
    budget = Budget(COST, StepShape(), 100, math.inf, 1)
    budget.spend(0, 60)
    assert budget.tokens == 40
    assert budget.chunk(0, 30) == 30
    timed = Budget(COST, StepShape(), 1000, 0.0111, 1)
    first = timed.chunk(0, 1000)
    timed.spend(0, first // 2)
    assert timed.chunk(0, 1000) < first


def test_equal_time_chunks_get_shorter_as_the_context_grows():
    seconds = equal_time_seconds(COST, StepShape(), 256)
    start, counts = 0, []
    for _ in range(8):
        counts.append(Budget(COST, StepShape(), 256, seconds, 1).chunk(start, 10_000))
        start += counts[-1]
    assert counts[0] == 256
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 200
    assert equal_time_seconds(COST, StepShape(), 0) == pytest.approx(math.inf)
