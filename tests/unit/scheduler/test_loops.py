"""A sample that goes round in circles is noticed at the very token that completes the last repetition."""

from __future__ import annotations

import random

import pytest

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.loops import Loops
from quire.scheduler.params import Repetition, SamplingParams
from quire.scheduler.plan import RowResult, StepResult
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step_time import StepCost


def first_loop(output: list[int], prompt: list[int], **wish: int) -> int | None:
    """Tokens drawn when the loop was seen."""
    loops = Loops(Repetition(**wish))
    for drawn in range(1, len(output) + 1):
        if loops.push([*prompt, *output[:drawn]], drawn):
            return drawn
    return None


def by_definition(output: list[int], wish: Repetition) -> int | None:
    for drawn in range(1, len(output) + 1):
        for size in range(wish.min_pattern_size, wish.max_pattern_size + 1):
            tail = output[max(0, drawn - size * wish.min_count) : drawn]
            if len(tail) == size * wish.min_count and tail == tail[-size:] * wish.min_count:
                return drawn
    return None


@pytest.mark.parametrize(
    ("output", "wish", "drawn"),
    [
        ([1, 2, 3, 3], {"max_pattern_size": 1, "min_count": 2}, 4),
        ([1, 2, 1, 2, 1, 2], {"max_pattern_size": 2, "min_count": 3}, 6),
        ([1, 2, 1, 2, 1, 2], {"max_pattern_size": 2, "min_count": 4}, None),
        ([1, 1, 1, 1], {"max_pattern_size": 2, "min_pattern_size": 2, "min_count": 2}, 4),
        ([1, 2, 3, 1, 2, 3], {"max_pattern_size": 2, "min_count": 2}, None),
    ],
)
def test_patterns(output, wish, drawn):
    assert first_loop(output, [], **wish) == drawn


def test_the_prompt_is_no_part_of_a_loop():
    assert first_loop([5, 5], [5, 5, 5], max_pattern_size=1, min_count=3) is None


def test_as_by_definition_on_random_texts_of_few_tokens():
    rng = random.Random(0)
    seen = 0
    for _ in range(300):
        least = rng.randint(1, 4)
        wish = Repetition(min_pattern_size=least, max_pattern_size=rng.randint(least, 6), min_count=rng.randint(2, 4))
        output = [rng.randrange(2) for _ in range(40)]
        drawn = first_loop(
            output,
            [0, 1],
            max_pattern_size=wish.max_pattern_size,
            min_pattern_size=wish.min_pattern_size,
            min_count=wish.min_count,
        )
        assert drawn == by_definition(output, wish)
        seen += drawn is not None
    assert seen > 100


@pytest.mark.parametrize(("min_tokens", "drawn"), [(0, 4), (7, 7)])
def test_a_loop_ends_its_sample_and_no_other_and_not_before_min_tokens(min_tokens, drawn):
    config = SchedulerConfig(
        num_blocks=65, block_size=4, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=128,
        eos_token_ids=frozenset([2]),
    )  # fmt: skip
    s = Scheduler(config, StepCost(tile=1, base=1e-3, per_tile=1e-4, per_context=1e-7, per_pair=1e-8))
    wish = Repetition(max_pattern_size=2, min_count=4)
    s.add("loop", [9, 9, 9], SamplingParams(max_tokens=12, min_tokens=min_tokens, repetition=wish))
    s.add("free", [9, 9, 8], SamplingParams(max_tokens=12))
    ends: dict[str, tuple[str, int]] = {}
    drawn_by: dict[str, int] = {"loop": 0, "free": 0}
    while (plan := s.schedule(0.0)) is not None:
        rows = [RowResult([7] if row.samples else []) for row in plan.rows]
        for chunk in s.update(plan, StepResult(plan.step_id, rows, [RowResult([7]) for _ in plan.draws])):
            drawn_by[chunk.request_id] += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                ends[chunk.request_id] = (chunk.finish_reason, drawn_by[chunk.request_id])
        s.check()
    assert ends == {"loop": ("repetition", drawn), "free": ("length", 12)}
