from __future__ import annotations

import math
from pathlib import Path

import pytest

from quire.bench.fairness import FLOOD, VISITOR, FairnessConfig, Stay, Visit, load, run, stay, table
from quire.bench.simulated import SimulatedEngine
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step_time import StepCost

COST = StepCost(tile=16, base=0.01, per_tile=0.01, per_context=0.0, per_pair=0.0)


def engine(policy: str = "fcfs") -> SimulatedEngine:
    config = SchedulerConfig(
        num_blocks=2000,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_num_prefill_tokens=32,
        max_model_len=512,
        policy=policy,
        prefix_caching=False,
    )
    return SimulatedEngine(Scheduler(config, COST), COST)


def test_a_lone_visit_takes_what_the_cost_says() -> None:
    machine = engine()
    config = FairnessConfig(visits=1, visit_prompt_len=16, visit_output_len=3)
    found = stay(machine, machine, load(config, "fcfs", 2, 512, flood=False))
    assert [(v.due, v.ttft) for v in found.visits] == [(0.0, pytest.approx(0.02))]


def test_the_load_is_the_same_visits_with_and_without_the_flood() -> None:
    config = FairnessConfig(flood_requests=5, visits=7)
    alone, flooded = (load(config, "fcfs", 100, 512, flood) for flood in (False, True))
    assert [r.tenant for _, r in flooded] == [FLOOD] * 5 + [VISITOR] * 7
    assert flooded[5:] == alone
    assert {time for time, _ in flooded[:5]} == {0.0}
    assert len({tuple(r.prompt_ids) for _, r in flooded}) == 12


def test_each_policy_is_given_what_it_heeds() -> None:
    config = FairnessConfig(flood_requests=1, visits=1)

    def told(policy: str) -> list[tuple[int, float | None]]:
        return [(r.priority, r.slo.ttft) for _, r in load(config, policy, 2, 512, True)]

    assert told("strict_fcfs") == told("fcfs") == told("fair") == [(0, None), (0, None)]
    (flood, _), (visitor, _) = told("priority")
    assert visitor < flood
    assert told("deadline")[1][1] is not None


def test_only_visits_during_the_flood_count() -> None:
    found = Stay([Visit(0.0, 1.0), Visit(1.0, 2.0), Visit(5.0, 99.0)], flood_end=4.0)
    assert found.counted == 2
    assert found.p95_ttft_ms == pytest.approx(1950)
    assert math.isnan(Stay([Visit(5.0, 1.0)], flood_end=4.0).p95_ttft_ms)


def test_the_end_of_the_flood_is_noticed() -> None:
    machine = engine()
    config = FairnessConfig(flood_requests=2, flood_prompt_len=64, flood_output_len=2, visits=30, visit_rate=1.0)
    found = stay(machine, machine, load(config, "fcfs", 2, 512, True))
    assert 0 < found.flood_end < 2
    assert 0 < found.counted < 30


def test_fair_beats_arrival_order_in_simulation() -> None:
    result = run(FairnessConfig(simulate=True, profile="a100-7b", policies=("strict_fcfs", "fair")))
    flooded = result["flooded_p95_ttft_ms"]
    assert flooded["fair"] < flooded["strict_fcfs"] / 10
    assert result["solo_p95_ttft_ms"] < flooded["fair"]
    assert result == run(FairnessConfig(simulate=True, profile="a100-7b", policies=("strict_fcfs", "fair")))
    assert table(result).row_count == 3


def test_an_engine_of_this_process_is_measured(tiny_model: Path) -> None:
    config = FairnessConfig(
        model=str(tiny_model), threads=1, policies=("fair",), flood_requests=3, visits=3, visit_rate=200.0
    )
    result = run(config)
    assert result["visits_during_flood"]["fair"] > 0
    assert result["flooded_p95_ttft_ms"]["fair"] > 0


@pytest.mark.parametrize(
    "bad",
    [
        {"simulate": True, "url": "http://127.0.0.1:9"},
        {"policies": ("lottery",)},
        {"visits": 0},
        {"visit_rate": 0.0},
        {"flood_prompt_len": 0},
    ],
)
def test_bad_settings_name_their_option(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="--"):
        FairnessConfig(**bad)  # type: ignore[arg-type]
