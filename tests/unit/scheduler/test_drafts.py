"""Rows with guesses: what they are given room for, and what is taken in of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.drafts import DraftOrder, parse_shape
from quire.scheduler.params import SamplingParams, Slo, Speculative
from quire.scheduler.plan import Chunk, DraftPass, RowResult, StepPlan, StepResult
from quire.scheduler.roster import Refused
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.speculation import Wish
from quire.scheduler.step_time import StepCost, StepShape

COST = StepCost(tile=16, base=1e-2, per_tile=1e-3, per_context=1e-7, per_pair=1e-8)
PARAMS = SamplingParams(max_tokens=50, temperature=0.0)
EOS = 2


def scheduler(**changes: object) -> Scheduler:
    settings = {
        "num_blocks": 65,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_num_prefill_tokens": 8,
        "max_model_len": 64,
        "eos_token_ids": frozenset([EOS]),
        "draft_method": "draft",
        "draft_shape": parse_shape("chain:4", 0),
        "adaptive_drafts": False,
    }
    return Scheduler(SchedulerConfig(**(settings | changes)), COST)


def prompt(first: int, length: int) -> list[int]:
    return [first, *range(100, 99 + length)]


def answer(
    s: Scheduler, plan: StepPlan, *accepted: int, tokens: list[int] | None = None, **more: object
) -> list[Chunk]:
    """accepted: how many guesses of each row with a draft are right; their tokens are 7, or those of `tokens`."""
    right = iter(accepted)
    rows = []
    for row in plan.rows:
        if row.draft:
            drawn = tokens or [7] * (next(right) + 1)
            rows.append(RowResult(drawn, drafted=row.draft.shape.nodes, draft_depth=row.draft.shape.depth, **more))
        else:
            rows.append(RowResult([7] if row.samples else []))
    chunks = s.update(plan, StepResult(plan.step_id, rows, [RowResult([7]) for _ in plan.draws]))
    s.check()
    return chunks


def begin(s: Scheduler, *lengths: int, **more: object) -> None:
    """Requests of these prompts, each with its first token."""
    for i, length in enumerate(lengths):
        s.add(str(i), prompt(i, length), more.pop("params", PARAMS), **more)
    while any(request.remaining > 1 for request in s.running) or s.num_waiting:
        plan = s.schedule(0.0)
        answer(s, plan, *[0] * len(plan.rows))


def test_an_order_says_what_another_guess_must_be_worth():
    s = scheduler(adaptive_drafts=True)
    s.drafting.speculation.cost._times["draft"] = 2
    s.drafting.speculation.cost.of("draft").a = COST.base / 20
    begin(s, 6)
    (row,) = s.schedule(0.0).rows
    assert row.draft is not None
    (request,) = s.running
    assert row.draft.go_on == pytest.approx(s.drafting.speculation.go_on(Wish(request, row.draft), 1), rel=1e-3)
    assert row.draft.go_on > 0.01


def test_a_stream_gets_its_token_and_room_for_its_guesses():
    s = scheduler()
    begin(s, 6)
    plan = s.schedule(0.0)
    (row,) = plan.rows
    assert (row.start, row.num_tokens, row.samples) == (6, 5, True)
    assert row.draft == DraftOrder("draft", parse_shape("chain:4", 0))
    assert len(s.running[0].block_ids) == 3, "tokens 6 to 10 lie in the second block and the third"
    assert s.shape == StepShape(5, 7, 4 * (7 + 2))
    (chunk,) = answer(s, plan, 3)
    assert (chunk.token_ids, chunk.num_drafted, chunk.num_accepted) == ([7] * 4, 4, 3)
    (request,) = s.running
    assert (request.num_computed, len(request.token_ids)) == (10, 11)
    assert s.schedule(0.0).rows[0].start == 10


def test_a_prompt_gets_none():
    s = scheduler()
    s.add("a", prompt(1, 12), PARAMS)
    s.add("b", prompt(2, 1), PARAMS)
    assert not any(row.draft for row in s.schedule(0.0).rows)


def test_only_what_is_right_is_published():
    s = scheduler()
    begin(s, 6)
    answer(s, s.schedule(0.0), 0)
    assert s.running[0].num_published == 1
    answer(s, s.schedule(0.0), 4)
    assert s.running[0].num_published == 3
    assert s.running[0].num_computed == 12


def test_an_end_inside_the_accepted_tokens_ends_there():
    s = scheduler()
    begin(s, 6)
    (chunk,) = answer(s, s.schedule(0.0), tokens=[7, EOS, 7, 7, 7])
    assert (chunk.token_ids, chunk.finish_reason, chunk.num_accepted) == ([7, EOS], "stop", 2)
    assert not s.has_work
    assert s.counters.generated_tokens == 3
    assert (s.counters.drafted, s.counters.accepted, s.counters.wasted) == (4, 2, 2)


def test_a_block_that_an_end_left_unsaid_is_not_published():
    s = scheduler()
    begin(s, 8)
    answer(s, s.schedule(0.0), tokens=[EOS, 7, 7, 7, 7])
    assert s.pool.num_cached == 2, "twelve tokens were computed, and ten are the request's"


def test_no_more_is_guessed_than_may_be_drawn():
    s = scheduler()
    begin(s, 6, params=replace(PARAMS, max_tokens=5))
    plan = s.schedule(0.0)  # one is drawn, four may follow: three guesses and the token after them
    assert plan.rows[0].draft.shape.depth == 3
    (chunk,) = answer(s, plan, 3)
    assert (len(chunk.token_ids), chunk.finish_reason) == (4, "length")
    begin(s, 6, params=replace(PARAMS, max_tokens=2))
    plan = s.schedule(0.0)
    assert plan.rows[0].draft is None
    answer(s, plan)


def test_a_tree_has_places_for_all_its_nodes():
    s = scheduler(draft_shape=parse_shape("rsd-c:2,2,1", 0), max_model_len=16)
    begin(s, 4)
    plan = s.schedule(0.0)
    assert plan.rows[0].num_tokens == 11
    assert len(s.running[0].block_ids) == 4
    answer(s, plan, 2)
    assert s.schedule(0.0).rows[0].draft.shape == parse_shape("rsd-c:2,2", 0), "eight tokens, eight places"


def test_guesses_come_after_prompts():
    s = scheduler(max_num_batched_tokens=12)
    begin(s, 6)
    s.add("long", prompt(9, 30), PARAMS)
    plan = s.schedule(0.0)
    assert [row.num_tokens for row in plan.rows] == [4, 8]
    answer(s, plan, 1)


def test_blocks_that_streams_will_need_are_not_taken():
    s = scheduler(num_blocks=9, max_model_len=32)
    begin(s, 8, 8)
    plan = s.schedule(0.0)  # eight blocks: two prompts of two, one each for the ninth token, two kept
    assert s.pool.num_free == 2
    assert [row.num_tokens for row in plan.rows] == [4, 4], "what fits into the blocks that they have"
    answer(s, plan, 0, 0)


def test_a_promised_gap_holds_with_guesses():
    s = scheduler(slo_itl=0.012)
    begin(s, 6, 6, 6)
    s.drafting.speculation.cost.verifying.b = 2e-4
    plan = s.schedule(0.0)
    nodes = sum(row.num_tokens - 1 for row in plan.rows)
    assert 0 < nodes < 12
    predicted = s.steps.cost.seconds(s.shape) + 2e-4 * nodes
    assert predicted * s.steps.margin <= 0.012 < (predicted + 2e-4) * s.steps.margin
    answer(s, plan, 0, 0, 0)
    s = scheduler()
    begin(s, 6, slo=Slo(itl=0.005))
    assert s.schedule(0.0).rows[0].draft is None


def test_who_cannot_be_guessed_for_goes_on_without():
    s = scheduler()
    begin(s, 6, 6)
    plan = s.schedule(0.0)
    rows = [RowResult([7], draft_error="it raised"), RowResult([7, 7], drafted=2, draft_depth=2)]
    s.update(plan, StepResult(plan.step_id, rows))
    assert [row.draft is None for row in s.schedule(0.0).rows] == [True, False]
    assert s.counters.draft_failures == 1
    assert (s.counters.drafted_at, s.counters.accepted_at) == ([1, 1, 0, 0], [1, 0, 0, 0])


def test_a_row_that_fails_ends_its_request():
    s = scheduler()
    begin(s, 6)
    plan = s.schedule(0.0)
    (chunk,) = s.update(plan, StepResult(plan.step_id, [RowResult(error="NaN")]))
    assert chunk.finish_reason == "error"
    s.check()


def test_nothing_is_planned_while_guesses_are_out():
    s = scheduler()
    begin(s, 6)
    plan = s.schedule(0.0)
    assert not s.may_plan_ahead()
    answer(s, plan, 0)
    s = scheduler(draft_method="none", draft_shape=None)
    begin(s, 6)
    s.schedule(0.0)
    assert s.may_plan_ahead()


def test_a_stream_whose_token_is_out_is_not_guessed_for_but_is_waited_for_next():
    s = scheduler()
    s.add("a", prompt(1, 6), PARAMS)
    first = s.schedule(0.0)
    assert s.may_plan_ahead()
    second = s.schedule(0.0)
    assert second.rows[0].draft is None
    answer(s, first)
    assert not s.may_plan_ahead()
    answer(s, second)
    third = s.schedule(0.0)
    assert third.rows[0].draft is not None
    answer(s, third, 0)


def test_a_request_chooses_for_itself():
    s = scheduler()
    s.add("none", prompt(1, 2), PARAMS, speculative=Speculative(method="none"))
    s.add("two", prompt(2, 2), PARAMS, speculative=Speculative(num_tokens=2), cache_salt="s")
    s.add("look-up", prompt(3, 2), PARAMS, speculative=Speculative(method="ngram"))
    with pytest.raises(Refused, match="num_tokens is 9"):
        s.add("nine", prompt(4, 2), PARAMS, speculative=Speculative(num_tokens=9))
    plan = s.schedule(0.0)
    assert [new.salt for new in plan.new] == ["", "s", ""]
    answer(s, plan)
    orders = [row.draft for row in s.schedule(0.0).rows]
    assert orders == [
        None,
        DraftOrder("draft", parse_shape("chain:2", 0)),
        DraftOrder("ngram", parse_shape("chain:4", 0)),
    ]


def test_a_tenant_pays_for_its_guesses():
    s = scheduler(policy="fair")
    s.add("a", prompt(1, 6), PARAMS, tenant="guesses")
    s.add("b", prompt(2, 6), PARAMS, tenant="does not", speculative=Speculative(method="none"))
    answer(s, s.schedule(0.0))
    before = {tenant: s.service.seconds(tenant) for tenant in ("guesses", "does not")}
    plan = s.schedule(0.0)
    rows = [RowResult([7], drafted=4, draft_depth=4) if row.draft else RowResult([7]) for row in plan.rows]
    s.update(plan, StepResult(plan.step_id, rows, drafting=[DraftPass("draft", 4, 4, 0.003)]))
    paid = {tenant: s.service.seconds(tenant) - seconds for tenant, seconds in before.items()}
    assert paid["guesses"] - paid["does not"] == pytest.approx(0.003 + 4 * 1e-3 / 16 + 1e-8 * 4 * (7 + 2))


def test_steps_are_learned_from_by_the_rows_that_were_run():
    """Nothing was found to guess: the step was one of decodes."""
    s = scheduler(draft_method="ngram")
    begin(s, 6)
    plan = s.schedule(0.0)
    s.update(plan, StepResult(plan.step_id, [RowResult([7])], drafting=[DraftPass("ngram", 0, 0, 1e-3)]), 0.021)
    s.steps.fit()
    assert s.steps.cost.seconds(StepShape(1, 7)) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_shape": None}, "give both"),
        ({"draft_method": "none"}, "give both"),
        ({"draft_shape": parse_shape("chain:40", 0)}, "max_num_batched_tokens 32: a step must hold them"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        scheduler(**changes)
