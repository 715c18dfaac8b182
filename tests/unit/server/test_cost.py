"""What a request costs: nothing that makes work is free, and every estimate learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.step_time import StepCost, StepShape
from quire.server.cost import Asked, Cost, RunningMean, cost_seconds

STEP = StepCost(tile=16, base=0.004, per_tile=0.008, per_context=1e-7, per_pair=1e-8)
FACTS = {"bytes_per_token": 4.0, "tokens_per_sample": 100.0, "max_num_seqs": 8}
BASE = Asked(prompt_bytes=4000, max_tokens=50)


def cost(asked: Asked, **facts: float) -> Cost:
    return cost_seconds(asked, STEP, **{**FACTS, **facts})


def test_a_plain_request_by_hand():
    tokens, drawn = 1000, 50
    prompts = 0.004 + tokens * (0.008 / 16 + 1e-8 * tokens / 2)
    a_token = 0.004 / 8 + 0.008 / 16 + 1e-7 * (tokens + drawn / 2)
    assert cost(BASE) == pytest.approx((prompts, drawn * a_token))
    assert cost(BASE).total == pytest.approx(prompts + drawn * a_token)


def test_a_full_batch_costs_what_its_steps_take():
    """Eight samples that draw together are as expensive as the steps they are in."""
    asked = Asked(samples=8, prompt_ids=100, max_tokens=10)
    step = StepCost(tile=1, base=0.004, per_tile=0.001, per_context=1e-6, per_pair=0.0)
    steps = sum(step.seconds(StepShape(8, 8 * (100 + i))) for i in range(10))
    assert cost_seconds(asked, step, **FACTS).samples == pytest.approx(steps, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"samples": 2}, "samples"),
        ({"max_tokens": 51}, "samples"),
        ({"max_tokens": None}, "samples"),
        ({"logprobs": True}, "samples"),
        ({"prompt_bytes": 4100}, "prompts"),
        ({"prompt_ids": 10}, "prompts"),
        ({"prompt_logprobs": True}, "prompts"),
    ],
)
def test_whatever_makes_work_is_counted(changes, part):
    assert getattr(cost(replace(BASE, **changes)), part) > getattr(cost(BASE), part)


def test_a_sample_costs_its_max_tokens_at_most_and_what_samples_draw_usually():
    assert cost(replace(BASE, max_tokens=1000)) == cost(replace(BASE, max_tokens=None))
    assert cost(BASE, tokens_per_sample=20.0) < cost(BASE)
    assert cost(replace(BASE, max_tokens=0)).samples == 0


@given(st.integers(1, 50), st.integers(1, 20))
def test_costs_add_up_over_prompts_and_samples(prompts, n):
    one = cost(Asked(prompt_ids=100, max_tokens=7))
    many = cost(Asked(prompts=prompts, samples=prompts * n, prompt_ids=100 * prompts, max_tokens=7))
    assert many == pytest.approx((prompts * one.prompts, prompts * n * one.samples))


def test_what_all_prompts_begin_with_is_computed_once():
    apart = Asked(prompts=10, samples=10, prompt_bytes=10 * 4000, max_tokens=1)
    together = replace(apart, shared_bytes=3600)
    once = 900 * (0.008 / 16 + 1e-8 * 900 / 2)
    own = 100 * (0.008 / 16 + 1e-8 * (900 + 100 / 2))
    assert cost(together).prompts == pytest.approx(10 * 0.004 + once + 10 * own)
    assert cost(together).samples == cost(apart).samples


def test_a_prompt_costs_what_is_kept_of_it():
    assert cost(replace(BASE, longest_prompt=100)) == cost(replace(BASE, prompt_bytes=400))
    assert cost(replace(BASE, longest_prompt=5000)) == cost(BASE)


def test_a_mean_follows_what_it_sees():
    mean = RunningMean(4.0)
    assert mean.value == 4.0
    mean.observe(1000, 500)
    assert mean.value == pytest.approx(2.0, rel=0.01)
    for _ in range(1000):
        mean.observe(300, 100)
    assert mean.value == pytest.approx(3.0, rel=0.001)
    mean.observe(5, 0)
    assert mean.value == pytest.approx(3.0, rel=0.001)
