"""The replay of traces through the pool, on small ones."""

from __future__ import annotations

import json

import pytest

from quire.bench.eviction import ORDERS, EvictionConfig, hit_tokens, jobs_of, run, table, working_set
from quire.bench.sessions import SessionConfig, TraceRequest, adversarial, multi_turn, scan

SMALL = EvictionConfig(fractions=(0.5,), sessions=SessionConfig(sessions=40, seconds=200.0, context=512))


def ask(time: float, *prompt: int, answer: int = 1) -> TraceRequest:
    return TraceRequest(time, prompt, ((7,) * answer,), "t")


def test_a_repeated_prompt_is_found_in_every_order() -> None:
    config = EvictionConfig(block_size=4)
    jobs = jobs_of([ask(0.0, *range(9)), ask(1.0, *range(9)), ask(2.0, *range(4), 9, 9, 9, 9, 9)], config)
    assert hit_tokens(jobs, 10, config) == dict.fromkeys(ORDERS, 8 + 4)


def test_the_working_set_is_what_is_used_before_and_again() -> None:
    config = EvictionConfig(block_size=4)
    first, second = tuple(range(8)), tuple(range(100, 108))
    trace = [ask(0.0, *first), ask(1.0, *second), ask(2.0, *first), ask(3.0, *first)]
    assert working_set(jobs_of(trace, config)) == 4, "the second prompt, while the first is still wanted"
    assert working_set(jobs_of(trace[1:2], config)) == 2


def test_belady_is_given_the_future_and_uses_it() -> None:
    config = EvictionConfig(block_size=4)
    jobs = jobs_of(scan(180, 4, seed=0), config)
    hits = hit_tokens(jobs, 180, config)
    assert hits["lru"] == 0
    assert hits["belady"] > 0


def test_a_conversation_says_again_what_was_said() -> None:
    config = SessionConfig(sessions=100, seconds=200.0)
    trace = multi_turn(config, seed=3)
    assert [request.time for request in trace] == sorted(request.time for request in trace)
    assert {request.n for request in trace} == {1, 4}
    continued = [
        later
        for later in trace
        if any(later.prompt[: len(r.prompt) + len(r.outputs[0])] == r.prompt + r.outputs[0] for r in trace)
    ]
    assert continued
    assert multi_turn(config, seed=3) == trace
    assert multi_turn(config, seed=4) != trace


def test_misleading_traffic_costs_at_most_three_percent_of_the_hits() -> None:
    config = EvictionConfig()
    hits = hit_tokens(jobs_of(adversarial(200, config.block_size, seed=0), config), 200, config)
    for order in ("discard", "phase"):
        assert hits[order] >= 0.97 * hits["lru"]


def test_a_run_is_decided_by_its_seed_and_survives_json() -> None:
    result = run(SMALL)
    assert run(SMALL) == result
    rows = json.loads(json.dumps(result))["rows"]
    assert {row["trace"] for row in rows} == {"multi_turn", "adversarial", "scan"}
    for row in rows:
        assert set(row["hit_tokens"]) == set(ORDERS)
        assert row["hit_tokens"]["belady"] >= row["hit_tokens"]["lru"]
    assert table(result).row_count == 3


def test_a_request_larger_than_the_cache_is_refused() -> None:
    config = EvictionConfig(block_size=4)
    with pytest.raises(ValueError, match="does not fit"):
        hit_tokens(jobs_of([ask(0.0, *range(40))], config), 5, config)
