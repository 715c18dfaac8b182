"""Who runs first, who gives way, and how long a newcomer would wait."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from quire.scheduler import limits
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.fairness import ABSENT, Service
from quire.scheduler.forecast import wait_seconds
from quire.scheduler.params import Grammar, SamplingParams, Slo
from quire.scheduler.plan import RowResult, StepPlan, StepResult
from quire.scheduler.policy import PATIENCE
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step_time import StepCost, StepShape

COST = StepCost(tile=1, base=1e-3, per_tile=1e-3, per_context=0.0, per_pair=0.0)


def scheduler(policy: str, **changes: object) -> Scheduler:
    settings = {
        "num_blocks": 400,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "overtaking": 10.0,
        "max_num_prefill_tokens": 16,
        "max_model_len": 256,
        "policy": policy,
    }
    return Scheduler(SchedulerConfig(**(settings | changes)), COST)


def prompt(first: int, length: int) -> list[int]:
    return [first, *range(1000, 999 + length)]


def answer(max_tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **more)


def step(s: Scheduler, now: float) -> StepPlan | None:
    plan = s.schedule(now)
    if plan is not None:
        rows = [RowResult([7] if row.samples else []) for row in plan.rows]
        s.update(plan, StepResult(plan.step_id, rows, [RowResult([7]) for _ in plan.draws]))
        s.check()
    return plan


def running(s: Scheduler) -> set[str]:
    return {request.request_id for request in s.running}


def finish_order(s: Scheduler, now: float = 0.0) -> list[str]:
    order: list[str] = []
    while s.has_work:
        plan = s.schedule(now)
        assert plan is not None
        rows = [RowResult([7] if row.samples else []) for row in plan.rows]
        order += [c.request_id for c in s.update(plan, StepResult(plan.step_id, rows)) if c.finish_reason]
        now += 0.01
    return order


def test_a_short_prompt_overtakes_a_long_one_for_a_bounded_time():
    work = 100 * COST.per_tile
    for overtaking, arrival, first in ((10, 5 * work, "short"), (10, 15 * work, "long"), (0, 1e-9, "long")):
        s = scheduler("fcfs", max_num_seqs=1, overtaking=overtaking)
        s.add("busy", prompt(1, 4), answer(2))
        step(s, 0.0)
        s.add("long", prompt(2, 100), answer(1), arrival=0.0)
        s.add("short", prompt(3, 4), answer(1), arrival=arrival)
        assert finish_order(s, arrival)[1] == first


def test_a_cached_prompt_is_short():
    s = scheduler("fcfs", max_num_seqs=1)
    s.add("first", prompt(1, 100), answer(1))
    finish_order(s)
    s.add("busy", prompt(9, 4), answer(2))
    step(s, 0.0)
    s.add("new", prompt(2, 50), answer(1), arrival=0.0)
    s.add("again", prompt(1, 100), answer(1), arrival=0.1)
    assert finish_order(s) == ["busy", "again", "new"]


def test_priority_takes_a_place_in_a_full_batch_but_not_for_ever():
    s = scheduler("priority")
    for i in range(4):
        s.add(f"low{i}", prompt(i, 8), answer(50), priority=1)
    step(s, 0.0)
    for round_ in range(PATIENCE + 2):
        s.add(f"high{round_}", prompt(100 + round_, 8), answer(2), arrival=0.0)
        step(s, 0.0)
        if round_ == 0:
            assert "high0" in running(s)
            assert len(running(s)) == 4
        while f"high{round_}" in running(s):
            step(s, 0.0)
    assert max(r.num_preemptions for r in s.running) <= PATIENCE
    assert not any(name.startswith("high") for name in finish_order(s)[-3:])


@pytest.mark.parametrize("policy", ["fair", "deadline", "priority"])
def test_a_prompt_in_progress_goes_on_while_many_wait_who_come_first_and_cannot_enter(policy: str):
    """They are more than a step looks at; the place that they wait for is free when the prompt has been answered."""
    s = scheduler(policy, max_num_seqs=1)
    s.add("long", prompt(1, 200), answer(2), tenant="a", slo=Slo(ttft=50.0), priority=1)
    step(s, 0.0)
    (long,) = s.running
    long.num_preemptions = PATIENCE  # its place is not to be had
    for i in range(40):
        s.add(f"short{i}", prompt(2 + i, 8), answer(2), tenant=f"b{i}", slo=Slo(ttft=5.0))
    computed = []
    while "long" in running(s):
        computed.append(long.num_computed)
        assert step(s, 1.0) is not None
    assert computed == [64, 128, 192, 200]
    assert len(finish_order(s, 1.0)) == 40


def test_fcfs_displaces_nobody():
    s = scheduler("fcfs")
    for i in range(4):
        s.add(f"low{i}", prompt(i, 8), answer(5))
    step(s, 0.0)
    s.add("late", prompt(9, 8), answer(1), priority=-5)
    for _ in range(3):
        step(s, 0.0)
        assert running(s) == {"low0", "low1", "low2", "low3"}
    assert s.counters.preemptions == 0


def test_a_flood_leaves_the_other_tenant_its_share():
    waits = {}
    for policy in ("fcfs", "fair"):
        s = scheduler(policy)
        for i in range(50):
            s.add(f"flood{i}", prompt(i, 60), answer(40), tenant="flood")
        for k in range(30):
            step(s, 0.01 * k)
        assert len(s.running) == 4
        s.add("quiet", prompt(99, 60), answer(3), arrival=0.3, tenant="quiet")
        steps = 0
        while "quiet" in s.roster.groups:
            step(s, 0.3 + 0.01 * steps)
            steps += 1
        waits[policy] = steps
    assert waits["fair"] <= 8 < waits["fcfs"]


def test_who_is_owed_may_have_its_share_in_one_piece():
    taken = {}
    for policy in ("fcfs", "fair"):
        s = scheduler(policy, max_num_seqs=5)
        for i in range(3):
            s.add(f"flood{i}", prompt(i, 60), answer(100), tenant="flood")
        for _ in range(12):
            step(s, 0.0)
        s.add("quiet", prompt(99, 40), answer(3), arrival=0.1, tenant="quiet")
        plan = step(s, 0.1)
        assert plan is not None
        taken[policy] = max(row.num_tokens for row in plan.rows)
    assert taken == {"fcfs": 16, "fair": 40}
    s.service.charge("flood", 10.0)
    s.add("more", prompt(98, 60), answer(3), arrival=0.1, tenant="flood")
    plan = step(s, 0.1)
    assert plan is not None
    assert max(row.num_tokens for row in plan.rows) == 16, "nobody owes the flood anything"


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair", "deadline"])
def test_further_samples_are_not_starved_by_a_stream_of_prompts(policy: str):
    s = scheduler(policy, max_num_seqs=2)
    s.add("samples", prompt(1, 8), answer(3, n=6))
    for k in range(150):
        s.add(f"p{k}", prompt(100 + k, 8), answer(3), arrival=0.01 * k)
        step(s, 0.01 * k)
    assert "samples" not in s.roster.groups
    assert s.num_waiting > 10, "the prompts came faster than they could be served"


def test_a_further_sample_displaces_as_a_prompt_would():
    s = scheduler("fair", max_num_seqs=2)
    s.add("samples", prompt(1, 8), answer(30, n=2), tenant="quiet")
    step(s, 0.0)
    for i in range(5):
        s.add(f"flood{i}", prompt(100 + i, 8), answer(100), tenant="flood")
    s.service.charge("flood", 100.0)
    step(s, 0.0)
    assert [r.request_id for r in s.running] == ["samples", "samples"]


def test_service_is_shared_by_weight():
    s = scheduler("fair", tenant_weights={"big": 3.0, "small": 1.0}, max_num_seqs=2)
    for i in range(60):
        for tenant in ("big", "small"):
            s.add(f"{tenant}{i}", prompt(hash((tenant, i)) % 10**6, 30), answer(2), tenant=tenant)
    for k in range(60):
        step(s, 0.01 * k)
    left = {tenant: sum(name.startswith(tenant) for name in s.roster.groups) for tenant in ("big", "small")}
    served = {tenant: 60 - count for tenant, count in left.items()}
    assert served["small"] > 0
    assert 2.0 < served["big"] / served["small"] < 4.5


def test_earliest_deadline_first_and_the_promised_before_the_unpromised():
    s = scheduler("deadline", max_num_seqs=1)
    s.add("busy", prompt(1, 4), answer(3), slo=Slo(ttft=0.001))
    step(s, 0.0)
    s.add("none", prompt(2, 8), answer(1))
    s.add("late", prompt(3, 8), answer(1), slo=Slo(ttft=5.0))
    s.add("soon", prompt(4, 8), answer(1), slo=Slo(deadline=2.0))
    assert finish_order(s) == ["busy", "soon", "late", "none"]


def test_a_promise_displaces_who_was_promised_nothing():
    s = scheduler("deadline", max_num_seqs=1)
    s.add("idle", prompt(1, 8), answer(30))
    step(s, 0.0)
    s.add("urgent", prompt(2, 8), answer(1), slo=Slo(ttft=1.0))
    assert finish_order(s) == ["urgent", "idle"]
    assert s.counters.preemptions == 1


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair", "deadline"])
def test_what_runs_out_of_time_ends_wherever_it_is(policy: str):
    s = scheduler(policy, max_num_seqs=1)
    s.add("running", prompt(1, 8), answer(200), timeout=1.0)
    step(s, 0.0)
    s.add("waiting", prompt(2, 8), answer(5, n=3), timeout=0.5)
    s.add("promised", prompt(3, 8), answer(5), slo=Slo(deadline=0.7))
    assert s.expire(0.4) == []
    ended = s.expire(0.6)
    assert sorted((c.request_id, c.index, c.finish_reason, c.error) for c in ended) == [
        ("waiting", i, "expired", "timeout") for i in range(3)
    ]
    late = "unreachable" if policy == "deadline" else "deadline"
    assert [(c.request_id, c.error) for c in s.expire(0.8)] == [("promised", late)]
    assert [(c.request_id, c.error) for c in s.expire(1.0)] == [("running", "timeout")]
    s.check()
    assert (s.has_work, s.num_waiting, s.pool.num_used, s.counters.expired) == (False, 0, 0, 5)
    assert s.schedule(1.0) is None


def test_limits_of_those_who_left_are_forgotten():
    s = scheduler("fcfs")
    s.add("stays", prompt(1, 8), answer(5), timeout=20.0)
    for _ in range(1000):
        s.add("leaves", prompt(2, 8), answer(5), timeout=10.0)
        s.abort("leaves")
    assert len(s.roster.limits) <= 2 * 1 + limits.SPARE
    s.add("leaves", prompt(2, 8), answer(5), timeout=15.0)
    assert s.expire(14.0) == [], "the limits were of others by that name"
    assert [c.request_id for c in s.expire(30.0)] == ["leaves", "stays"]


def test_work_that_cannot_be_in_time_is_not_begun_under_deadline_alone():
    # 100 tokens of prompt and 50 to draw take at least 0.1 + 50 · 0.002 seconds.
    for policy, refused in (("deadline", True), ("fcfs", False)):
        s = scheduler(policy)
        s.add("hopeless", prompt(1, 100), answer(50), slo=Slo(deadline=0.15))
        assert [c.error for c in s.expire(0.0)] == (["unreachable"] if refused else [])
    s = scheduler("deadline")
    s.add("feasible", prompt(1, 100), answer(50), slo=Slo(deadline=0.5))
    s.add("may stop early", prompt(2, 100), SamplingParams(max_tokens=50), slo=Slo(deadline=0.15))
    constrained = SamplingParams(max_tokens=50, min_tokens=50, grammar=Grammar(kind="json_object"))
    s.add("may be complete early", prompt(3, 100), constrained, slo=Slo(deadline=0.16))
    assert s.expire(0.0) == []
    assert [c.request_id for c in s.expire(0.1)] == ["may stop early", "may be complete early"], "they waited too long"
    step(s, 0.1)
    assert [c.error for c in s.expire(0.45)] == [], "begun work goes on until the deadline itself"
    assert [c.error for c in s.expire(0.5)] == ["deadline"]


def test_a_promised_gap_decides_how_much_prompt_a_step_takes():
    s = scheduler("fcfs", slo_itl=0.031, max_num_batched_tokens=256)
    s.add("stream", prompt(1, 8), answer(100))
    step(s, 0.0)
    s.add("long", prompt(2, 200), answer(1))
    plan = step(s, 0.0)
    assert plan is not None
    assert 24 <= plan.num_tokens <= 30, "1 ms and 1 ms a token, below 31 ms with a margin"
    s.add("picky", prompt(3, 4), answer(50), slo=Slo(itl=0.011))
    for _ in range(3):
        step(s, 0.0)
    s.add("other", prompt(4, 200), answer(1))
    plan = step(s, 0.0)
    assert plan is not None
    assert plan.num_tokens <= 10, "the tightest running promise counts"


def test_a_tenant_that_returns_has_saved_nothing_up():
    service = Service({}, 8)
    service.arrives("a")
    service.charge("a", 100.0)
    service.arrives("b")
    assert service.seconds("b") == 100.0
    service.charge("b", 50.0)
    service.leaves("b")
    service.arrives("b")
    assert service.seconds("b") == 150.0, "nor is what it had forgotten"


def test_who_worked_alone_owes_nothing_for_it():
    service = Service({}, 8)
    service.arrives("alone")
    service.charge("alone", 500.0)
    service.leaves("alone")
    service.arrives("flood")
    assert service.seconds("flood") == 500.0
    service.charge("flood", 1.0)
    service.arrives("alone")
    assert service.seconds("alone") == 501.0


def test_names_of_strangers_do_not_fill_the_memory():
    service = Service({}, 8)
    service.arrives("here")
    for i in range(3 * ABSENT):
        service.arrives(str(i))
        service.charge(str(i), 1.0 + i)
        service.leaves(str(i))
    assert len(service._seconds) <= ABSENT + 1


def test_a_request_may_say_its_tenants_weight_anew():
    s = scheduler("fair", tenant_weights={"a": 2.0})
    assert (s.service.weight("a"), s.service.weight("b")) == (2.0, 1.0)
    s.add("a1", prompt(1, 8), answer(2), tenant="a", weight=5.0)
    s.add("a2", prompt(2, 8), answer(2), tenant="a")
    s.add("b1", prompt(3, 8), answer(2), tenant="b", weight=0.5)
    assert (s.service.weight("a"), s.service.weight("b")) == (5.0, 0.5), "who says nothing changes nothing"
    s.service.charge("b", 1.0)
    assert s.service.seconds("b") == 2.0


def test_weights_of_those_who_left_do_not_fill_the_memory():
    service = Service({}, 8)
    service.arrives("here")
    for i in range(3 * ABSENT):
        service.arrives(str(i), 2.0)
        service.charge(str(i), 1.0 + i)
        service.leaves(str(i))
    assert len(service._told) <= ABSENT


def test_interleaving_follows_what_would_be_served():
    service = Service({"b": 2.0}, 8)
    lanes = {"a": iter(["a1", "a2", "a3"]), "b": iter(["b1", "b2", "b3", "b4"])}
    order = list(service.interleave(lanes, lambda _: 1.0))
    assert order == ["a1", "b1", "b2", "a2", "b3", "b4", "a3"]


def test_a_lane_is_not_asked_for_more_than_comes_out():
    service, asked = Service({}, 8), []

    def lane(name: str) -> Iterator[str]:
        asked.append(name)
        yield name
        asked.append(name)
        yield name

    turns = service.interleave({name: lane(name) for name in "abcdefgh"}, lambda _: 1.0)
    assert [next(turns) for _ in range(3)] == ["a", "b", "c"]
    assert asked == ["a", "b", "c"]


def test_who_is_here_is_not_walked_over_to_know_a_share(monkeypatch: pytest.MonkeyPatch):
    service, asked = Service({}, 8), []
    for i in range(100):
        service.arrives(str(i))
    weight = Service.weight
    monkeypatch.setattr(Service, "weight", lambda self, tenant: asked.append(tenant) or weight(self, tenant))
    service.enters("7")
    service.enters("7")
    assert service.exceeds_share("7")
    assert asked == ["7"]


def test_one_place_is_nobodys_too_much():
    """Where tenants outnumber places, each would displace the next, and all streams stand still most of the time."""
    service = Service({}, 8)
    for i in range(100):
        service.arrives(str(i))
    service.enters("7")
    assert not service.exceeds_share("7")


def test_a_share_is_that_of_those_who_are_here():
    draw, service, here = random.Random(1), Service({"0": 0.1, "1": 3.0}, 8), Counter()
    for _ in range(2000):
        name = str(draw.randrange(6))
        if draw.random() < 0.5 and here[name]:
            service.leaves(name)
            here[name] -= 1
        else:
            service.arrives(name, draw.choice([None, None, 0.1, 0.3, 2.0]))
            here[name] += 1
        assert service._total == math.fsum(service.weight(name) for name in +here)


def test_a_share_that_is_met_is_not_exceeded_however_many_came_and_went():
    service = Service({}, 8)
    for name in ("a", "b"):
        service.arrives(name, 0.1)
    for i in range(100):
        service.arrives(str(i), 0.7 + i)
    for i in range(100):
        service.leaves(str(i))
    for _ in range(4):
        service.enters("a")
    assert not service.exceeds_share("a")
    service.enters("a")
    assert service.exceeds_share("a")


def test_the_forecast_is_the_longer_of_two_queues():
    idle = wait_seconds(
        COST, StepShape(), prefill_seconds=0, prefill_tokens=64, num_waiting=-4, num_running=0, mean_output=0
    )
    assert idle == 0
    busy = StepShape(4, 400, 0.0)
    step_time = COST.seconds(busy.plus(0, 16))
    budget = wait_seconds(
        COST, busy, prefill_seconds=1.6, prefill_tokens=16, num_waiting=-1, num_running=4, mean_output=10
    )
    assert budget == pytest.approx(100 * step_time), "1600 tokens, 16 a step"
    slots = wait_seconds(
        COST, busy, prefill_seconds=0.0, prefill_tokens=16, num_waiting=3, num_running=4, mean_output=10
    )
    assert slots == pytest.approx(4 * step_time * 10 / 4), "four must end before a newcomer's turn"


def test_a_scheduler_forecasts_more_the_more_waits():
    s = scheduler("fcfs")
    waits = [s.wait_seconds()]
    for i in range(40):
        s.add(str(i), prompt(i, 100), answer(20), arrival=float(i))
        if i % 10 == 0:
            step(s, float(i))
            waits.append(s.wait_seconds())
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert math.isfinite(waits[-1])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"policy": "lottery"}, "policy is 'lottery'"),
        ({"chunking": "words"}, "chunking is 'words'"),
        ({"overtaking": -1.0}, "overtaking is -1.0"),
        ({"overtaking": math.inf}, "overtaking is inf"),
        ({"slo_itl": 0.0}, "slo_itl is 0.0"),
        ({"slo_itl": math.nan}, "slo_itl is nan"),
        ({"tenant_weights": {"a": 0.0}}, r"tenant_weights\['a'\] is 0.0"),
        ({"tenant_weights": {"a": math.inf}}, r"tenant_weights\['a'\] is inf"),
        ({"eviction": "random"}, "eviction is 'random'"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(changes: dict[str, object], name: str):
    with pytest.raises(ValueError, match=name):
        scheduler(**({"policy": "fcfs"} | changes))
