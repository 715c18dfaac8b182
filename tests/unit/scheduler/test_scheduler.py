"""The scheduler's promises, one at a time."""

from __future__ import annotations

import pytest

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.params import Grammar, SamplingParams
from quire.scheduler.plan import Chunk, RowResult, StepPlan, StepResult
from quire.scheduler.policy import AGEING_SECONDS
from quire.scheduler.roster import Refused
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step_time import StepCost

COST = StepCost(tile=1, base=1e-3, per_tile=1e-4, per_context=1e-7, per_pair=1e-8)
GREEDY = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)


def scheduler(**changes: object) -> Scheduler:
    settings = {
        "num_blocks": 65,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "overtaking": 10.0,
        "max_num_prefill_tokens": 8,
        "max_model_len": 128,
        "eos_token_ids": frozenset([2]),
    }
    return Scheduler(SchedulerConfig(**(settings | changes)), COST)


def prompt(first: int, length: int) -> list[int]:
    """A prompt that shares no block with one of another `first`."""
    return [first, *range(100, 99 + length)]


def run(s: Scheduler, tokens: dict[int, int] | None = None, now: float = 0.0) -> tuple[StepPlan | None, list[Chunk]]:
    """One step; every row that samples draws token 7, or what `tokens` says for its slot."""
    plan = s.schedule(now)
    if plan is None:
        return None, []
    rows = [RowResult([(tokens or {}).get(row.slot, 7)] if row.samples else []) for row in plan.rows]
    draws = [RowResult([(tokens or {}).get(draw.slot, 7)]) for draw in plan.draws]
    chunks = s.update(plan, StepResult(plan.step_id, rows, draws))
    s.check()
    return plan, chunks


def counts(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [row.num_tokens for row in plan.rows]


def test_a_prompt_alone_takes_the_whole_budget_and_draws_in_the_step_that_ends_it():
    s = scheduler()
    s.add("a", prompt(1, 40), GREEDY)
    plan, chunks = run(s)
    assert counts(plan) == [32]
    assert not plan.rows[0].samples
    assert chunks == []
    plan, chunks = run(s)
    assert counts(plan) == [8]
    assert plan.rows[0].samples
    assert [c.token_ids for c in chunks] == [[7]]


def test_streams_run_in_every_step_and_a_long_prompt_takes_at_most_its_share_beside_them():
    s = scheduler()
    s.add("a", prompt(1, 5), GREEDY)
    s.add("b", prompt(2, 6), GREEDY)
    run(s)
    s.add("long", prompt(3, 100), GREEDY)
    for _ in range(12):
        plan, chunks = run(s)
        assert counts(plan) == [1, 1, 8]
        assert {c.request_id for c in chunks} == {"a", "b"}
    plan, chunks = run(s)
    assert counts(plan) == [1, 1, 4]
    assert {c.request_id for c in chunks} == {"a", "b", "long"}


def test_several_prompts_share_a_step():
    s = scheduler()
    for name in range(5):
        s.add(str(name), prompt(name, 10), GREEDY)
    plan, _ = run(s)
    assert counts(plan) == [10, 10, 10, 2]


def test_all_blocks_of_a_prompt_are_reserved_at_admission():
    s = scheduler(num_blocks=21, max_model_len=80)  # 80 tokens
    s.add("a", prompt(1, 60), GREEDY)
    s.add("b", prompt(2, 40), GREEDY, arrival=1.0)
    run(s)
    assert [r.request_id for r in s.running] == ["a"]
    assert s.pool.num_used == 15
    run(s)
    assert [r.request_id for r in s.running] == ["a"], "b's first chunk would fit, but not the whole of b"


def test_the_least_computed_is_preempted_and_never_the_oldest():
    s = scheduler(num_blocks=11, max_model_len=40, max_num_prefill_tokens=32)  # 10 blocks
    s.add("old", prompt(1, 4), GREEDY)
    s.add("big", prompt(2, 16), GREEDY)
    s.add("small", prompt(3, 12), GREEDY)
    preempted: list[str] = []
    for _ in range(8):
        before = {r.request_id for r in s.running}
        run(s)
        preempted += sorted(before - {r.request_id for r in s.running})
    assert preempted[0] == "small"
    assert "old" not in preempted
    assert s.counters.preemptions == len(preempted)


def test_a_cached_prompt_computes_only_what_is_new_and_at_least_one_token():
    s = scheduler()
    s.add("a", prompt(1, 12), SamplingParams(max_tokens=1, ignore_eos=True))
    run(s)
    s.add("b", prompt(1, 12), GREEDY)
    plan, chunks = run(s)
    assert counts(plan) == [4], "two of three blocks: the last token has to be computed"
    assert chunks[0].num_cached == 8
    s.add("c", prompt(1, 15), GREEDY)
    plan, _ = run(s)
    assert counts(plan) == [1, 3]


def test_another_salt_shares_nothing():
    s = scheduler()
    s.add("a", prompt(1, 12), SamplingParams(max_tokens=1), cache_salt="x")
    run(s)
    s.add("b", prompt(1, 12), GREEDY, cache_salt="y")
    plan, _ = run(s)
    assert counts(plan) == [12]


def test_equal_keys_of_other_tokens_are_not_believed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("quire.scheduler.request.block_key", lambda parent, tokens: b"collision")
    s = scheduler()
    s.add("a", prompt(1, 12), SamplingParams(max_tokens=1))
    run(s)
    s.add("b", prompt(2, 12), GREEDY)
    plan, _ = run(s)
    assert counts(plan) == [12]


def test_a_prefix_that_is_being_computed_is_waited_for_not_computed_twice():
    s = scheduler()
    for name in ("a", "b", "c"):
        s.add(name, [*prompt(1, 60), ord(name)], GREEDY)
    s.add("other", prompt(2, 4), GREEDY, arrival=1.0)
    plan, _ = run(s)
    assert counts(plan) == [32]
    plan, _ = run(s)
    assert counts(plan) == [29, 3], "the rest of a, and the start of `other`, which shares nothing"
    plan, _ = run(s)
    assert sorted(counts(plan)) == [1, 1, 1, 1], "b and c compute only their last token"


def test_whoever_waits_for_a_prefix_goes_on_when_its_computer_is_aborted():
    s = scheduler()
    s.add("a", prompt(1, 60), GREEDY)
    s.add("b", prompt(1, 60), GREEDY)
    run(s)
    s.abort("a")
    plan, _ = run(s)
    assert counts(plan) == [28], "32 of its 60 tokens are in the cache already"


def test_samples_share_the_prompt_and_copy_the_block_they_write_into():
    s = scheduler()
    s.add("a", prompt(1, 14), SamplingParams(max_tokens=20, n=3, ignore_eos=True))
    plan, _ = run(s)
    assert counts(plan) == [14]
    assert plan.rows[0].keeps is not None
    plan, chunks = run(s)
    assert counts(plan) == [1, 1, 1], "what a fork draws first is computed in the same step"
    assert len(plan.draws) == len(plan.copies) == 2, "the fourth block is half full: each fork gets its own"
    assert sorted(c.index for c in chunks) == [0, 1, 1, 2, 2]
    assert s.pool.num_used == 3 + 3
    plan, _ = run(s)
    assert counts(plan) == [1, 1, 1]
    assert plan.draws == []
    assert s.counters.prompt_tokens == 14, "the prompt is computed once, to its last token"


def test_priority_goes_first_and_age_outweighs_it():
    s = scheduler(max_num_seqs=1, policy="priority")
    s.add("running", prompt(1, 4), SamplingParams(max_tokens=2, ignore_eos=True))
    run(s)
    s.add("low", prompt(2, 4), SamplingParams(max_tokens=1), priority=1, arrival=0.0)
    s.add("high", prompt(3, 4), SamplingParams(max_tokens=1), priority=0, arrival=1.0)
    s.add("late", prompt(4, 4), SamplingParams(max_tokens=1), priority=0, arrival=AGEING_SECONDS + 1)
    order = []
    while s.has_work:
        order += [c.request_id for c in run(s)[1] if c.finish_reason]
    assert order == ["running", "high", "low", "late"]


def test_eos_stop_ids_and_lengths_end_a_sample():
    s = scheduler()
    s.add("eos", prompt(1, 4), SamplingParams(max_tokens=5))
    s.add("stop", prompt(2, 4), SamplingParams(max_tokens=5, stop_token_ids=(9,)))
    s.add("length", prompt(3, 4), SamplingParams(max_tokens=1))
    s.add("ignore", prompt(4, 4), SamplingParams(max_tokens=5, ignore_eos=True))
    s.add("early", prompt(5, 4), SamplingParams(max_tokens=5, min_tokens=2))
    s.add("none", prompt(6, 4), SamplingParams(max_tokens=0))
    _, chunks = run(s, {0: 2, 1: 9, 2: 7, 3: 2, 4: 2})
    ends = {c.request_id: (c.finish_reason, c.stop_reason, c.token_ids) for c in chunks}
    assert ends == {
        "eos": ("stop", None, [2]),
        "stop": ("stop", 9, [9]),
        "length": ("length", None, [7]),
        "ignore": (None, None, [2]),
        "early": (None, None, [2]),
        "none": ("length", None, []),
    }


def test_what_a_grammar_lets_end_ends_before_min_tokens_by_the_models_ends_alone():
    """Stop ids may be a part of the text, which goes on."""
    s = scheduler()
    constrained = SamplingParams(max_tokens=5, min_tokens=3, stop_token_ids=(9,), grammar=Grammar(kind="json_object"))
    s.add("end", prompt(1, 4), constrained)
    s.add("stop", prompt(2, 4), constrained)
    _, first = run(s, {0: 2, 1: 9})
    assert {c.request_id: (c.finish_reason, c.token_ids) for c in first} == {"end": ("stop", [2]), "stop": (None, [9])}
    run(s)
    _, last = run(s, {1: 9})
    assert [(c.finish_reason, c.stop_reason) for c in last] == [("stop", 9)]


def test_accepted_tokens_after_a_stop_are_dropped():
    s = scheduler()
    s.add("a", prompt(1, 4), SamplingParams(max_tokens=5))
    plan = s.schedule(0.0)
    chunks = s.update(plan, StepResult(plan.step_id, [RowResult([7, 2, 8])]))
    assert (chunks[0].token_ids, chunks[0].finish_reason) == ([7, 2], "stop")


def test_an_error_ends_one_request_and_its_blocks_are_not_believed():
    s = scheduler()
    s.add("bad", prompt(1, 12), GREEDY)
    s.add("good", prompt(2, 12), GREEDY)
    plan = s.schedule(0.0)
    chunks = s.update(plan, StepResult(plan.step_id, [RowResult(error="NaN"), RowResult([7])]))
    s.check()
    assert next((c.request_id, c.finish_reason, c.error) for c in chunks) == ("bad", "error", "NaN")
    assert [r.request_id for r in s.running] == ["good"]
    s.add("again", prompt(1, 12), GREEDY)
    plan, _ = run(s)
    assert counts(plan) == [1, 12 - 4], "chunked beside a stream, and nothing of it from the cache"


def answer_first(s: Scheduler, *rows: RowResult) -> None:
    """One step, whose first rows have these results; all others draw token 7."""
    plan = s.schedule(0.0)
    assert plan is not None
    rest = [RowResult([7] if row.samples else []) for row in plan.rows[len(rows) :]]
    s.update(plan, StepResult(plan.step_id, [*rows, *rest]))
    s.check()


def cached(s: Scheduler, ids: list[int]) -> int:
    """Prompt tokens that a request which asks now finds in the cache."""
    s.add("probe", ids, GREEDY, arrival=-1.0)
    s.schedule(0.0)
    found = next(r.num_cached for r in s.running if r.request_id == "probe")
    s.abort("probe")
    return found


COMMON = prompt(1, 24)


def after_a_good_one(s: Scheduler) -> None:
    s.add("good", [*COMMON, 50], SamplingParams(max_tokens=1))
    run(s)
    assert not s.has_work
    s.add("bad", [*COMMON, *range(60, 68)], GREEDY)


def test_an_error_that_says_nothing_of_kv_takes_nothing_out_of_the_cache():
    s = scheduler()
    after_a_good_one(s)
    answer_first(s, RowResult(error="no token may be drawn"))
    assert not s.has_work
    assert cached(s, [*COMMON, 51]) == 24


def test_what_a_request_wrote_stays_when_it_fails_for_another_reason():
    s = scheduler()
    after_a_good_one(s)
    run(s)
    answer_first(s, RowResult(error="no token may be drawn"))
    assert cached(s, [*COMMON, *range(60, 68), 51]) == 32


def test_a_first_row_without_numbers_casts_doubt_on_what_it_has_read():
    s = scheduler()
    after_a_good_one(s)
    answer_first(s, RowResult(error="NaN", unsound=True))
    assert cached(s, [*COMMON, 51]) == 0


def test_a_later_row_without_numbers_casts_doubt_on_what_its_request_wrote():
    s = scheduler()
    after_a_good_one(s)
    run(s)
    answer_first(s, RowResult(error="NaN", unsound=True))
    assert cached(s, [*COMMON, *range(60, 68), 51]) == 24, "an earlier row has read the rest, and gave numbers"


def test_who_shares_what_another_wrote_in_vain_goes_on():
    s = scheduler()
    after_a_good_one(s)
    run(s)
    s.add("sharer", [*COMMON, *range(60, 68), 51], GREEDY)
    run(s)
    assert s.pool.census().shared == 8
    answer_first(s, RowResult(error="NaN", unsound=True))
    assert [r.request_id for r in s.running] == ["sharer"]
    _, chunks = run(s)
    assert [c.token_ids for c in chunks] == [[7]]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_a_preempted_sample_begins_again_from_all_that_is_kept_of_it(n: int, caching: bool):
    """Its output lies in the cache, and its prompt is held for further samples."""
    s = scheduler(prefix_caching=caching)
    s.add("a", prompt(1, 10), SamplingParams(max_tokens=50, ignore_eos=True, n=n))
    for _ in range(20):
        run(s)
    request = s.running[-1]
    assert request.index == n - 1
    s._preempt(request)
    plan, _ = run(s)
    assert plan is not None
    (row,) = (row for row in plan.rows if row.slot == request.slot)
    assert row.start == (28 if caching else 8 if n == 2 else 0)
    assert request.findable == row.start, "the step was filled by what it lacks"


def test_abort_twice_before_and_after_returns_every_block():
    s = scheduler()
    assert s.abort("never") == []
    s.add("a", prompt(1, 40), SamplingParams(max_tokens=5, n=2))
    assert len(s.abort("a")) == 2
    s.add("a", prompt(1, 40), GREEDY)
    run(s)
    assert [c.finish_reason for c in s.abort("a")] == ["abort"]
    assert s.abort("a") == []
    s.check()
    assert s.pool.num_used == 0
    assert run(s) == (None, [])


def test_one_sample_ends_and_its_siblings_go_on():
    s = scheduler()
    s.add("a", prompt(1, 14), SamplingParams(max_tokens=20, n=3, ignore_eos=True))
    run(s)
    run(s)
    assert [c.index for c in s.abort("a", 1)] == [1]
    assert s.abort("a", 1) == []
    s.check()
    _, chunks = run(s)
    assert [c.index for c in chunks] == [0, 2]


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], GREEDY, "empty"),
        (prompt(1, 128), GREEDY, "context"),
        (prompt(1, 129), SamplingParams(max_tokens=0), "context"),
    ],
)
def test_the_impossible_is_refused_at_the_door(ids: list[int], params: SamplingParams, message: str):
    s = scheduler()
    with pytest.raises(Refused, match=message):
        s.add("a", ids, params)
    assert not s.has_work


def test_an_id_in_use_is_refused():
    s = scheduler()
    s.add("a", prompt(1, 4), GREEDY)
    with pytest.raises(Refused, match="in use"):
        s.add("a", prompt(2, 4), GREEDY)
    assert s.num_waiting == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens"),
        ({"max_num_prefill_tokens": 0}, "max_num_prefill_tokens"),
        ({"max_model_len": 1000}, "max_model_len"),
        ({"num_blocks": 1, "max_model_len": 0}, "num_blocks"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes: dict[str, object], name: str):
    with pytest.raises(ValueError, match=name):
        scheduler(**changes)


def test_a_thousand_waiting_requests_are_scheduled_in_order():
    s = scheduler()
    for i in range(1000):
        s.add(str(i), prompt(i, 3), SamplingParams(max_tokens=1), arrival=float(i))
    done: list[str] = []
    while s.has_work:
        done += [c.request_id for c in run(s)[1]]
    assert done == [str(i) for i in range(1000)]
    assert s.pool.num_used == 0
