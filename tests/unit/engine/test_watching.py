"""What is told of steps while somebody watches: it adds up, and nothing is told to an empty room."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.messages import AddRequest, StepOutputs, Watch, encoder, up_decoder
from quire.engine.watching import HOLDINGS_SECONDS, Watching
from quire.scheduler.params import SamplingParams

MOST = 24  # tokens of a step


@pytest.fixture
def core(tiny_model: Path) -> EngineCore:
    settings = {"num_blocks": 40, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": MOST, "threads": 1}
    return EngineCore(
        EngineConfig(model=str(tiny_model), dtype="float32", speculative_method="ngram", check=True, **settings)
    )


def greedy(tokens: int, **more: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)


def play(core: EngineCore) -> list[StepOutputs]:
    told = []
    while core.has_work:
        told.append(core.outputs(core.step()))
    return told


def add(core: EngineCore) -> None:
    pair = SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True, n=2)
    for name, prompt, params, tenant in (
        ("short", [7, 8, 9] * 3, greedy(30), "bob"),
        ("long", [*range(60)], greedy(30), "alice"),
        ("pair", [*range(8)], pair, "bob"),
        ("again", [*range(40)], greedy(5), "bob"),
    ):
        assert core.handle(AddRequest(name, prompt, params, tenant=tenant)) == []


def test_nothing_unless_somebody_watches(core: EngineCore) -> None:
    add(core)
    told = play(core)
    assert all(outputs.batch is None and outputs.holdings is None for outputs in told)
    assert b"batch" not in encoder.encode(told[0])


def test_what_is_told_adds_up(core: EngineCore) -> None:
    core.handle(Watch(60.0))
    core._watching._due = float("-inf")
    add(core)
    before, ends = core.outputs([]).stats, 0
    for outputs in play(core):
        batch, stats = outputs.batch, outputs.stats
        assert batch is not None
        assert up_decoder.decode(encoder.encode(outputs)) == outputs
        drafted = stats.draft_tokens_total - before.draft_tokens_total
        assert batch.drafted == drafted
        assert batch.accepted == stats.accepted_tokens_total - before.accepted_tokens_total <= drafted
        model_tokens = batch.decodes + batch.packed_tokens + batch.chunk_tokens + batch.drafted
        assert 0 < model_tokens == stats.step_tokens <= MOST
        assert batch.packed_prompts <= batch.packed_tokens
        assert (batch.chunk_prompts > 0) == (batch.chunk_tokens > 0)
        assert batch.seconds > 0
        before, ends = stats, ends + batch.packed_prompts
    assert ends > 0


def test_prompts_are_chunks_or_whole(core: EngineCore) -> None:
    core.handle(Watch(60.0))
    core.handle(AddRequest("long", [*range(60)], greedy(1)))
    told = [outputs.batch for outputs in play(core)]
    assert sum(batch.chunk_tokens for batch in told if batch) == 60
    assert not any(batch.packed_prompts or batch.decodes for batch in told if batch)
    for name in ("one", "two"):
        core.handle(AddRequest(name, [100, *name.encode(), *range(4)], greedy(2)))
    told = [outputs.batch for outputs in play(core)]
    assert [(b.packed_prompts, b.packed_tokens, b.decodes) for b in told if b] == [(2, 16, 0), (0, 0, 2)]


def test_samples_that_fork_are_streams_and_no_prompts(core: EngineCore) -> None:
    core.handle(Watch(60.0))
    core.handle(AddRequest("many", [*range(8)], SamplingParams(max_tokens=3, ignore_eos=True, n=4)))
    told = [outputs.batch for outputs in play(core)]
    assert [(b.packed_prompts, b.packed_tokens, b.decodes) for b in told if b] == [(1, 8, 0), (0, 0, 4), (0, 0, 4)]


def test_tokens_of_a_step_are_those_that_ran(tiny_model: Path) -> None:
    """Room is ordered for four guesses in every step, and nothing repeats: few or none are made."""
    settings = {"num_blocks": 40, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": MOST, "threads": 1}
    guessing = EngineConfig(
        model=str(tiny_model), dtype="float32", speculative_method="ngram", speculative_adaptive=False, **settings
    )
    core = EngineCore(guessing)
    rows = []
    gather = core.runner.slots.gather
    core.runner.slots.gather = lambda plain, *rest: (
        rows.append(sum(row.num_tokens for row in plain)) or gather(plain, *rest)
    )
    core.handle(AddRequest("a", [5, 6, 90, 7, 33], SamplingParams(max_tokens=20, temperature=2.0, seed=3)))
    told = [outputs.stats for outputs in play(core)]
    assert core.scheduler.counters.depths[0] < len(told), "steps for which guesses were ordered"
    assert [stats.step_tokens for stats in told] == rows
    assert [stats.launched_tokens for stats in told] == [core.scheduler.steps.cost.launched(count) for count in rows]


def test_holdings_are_those_of_the_pool(core: EngineCore) -> None:
    add(core)
    seen = set()
    while core.has_work:
        core.handle(Watch(60.0))
        core._watching._due = float("-inf")
        outputs = core.outputs(core.step())
        held = outputs.holdings
        assert held is not None
        assert held.shared_blocks + held.whole_blocks + held.open_blocks == outputs.stats.kv_blocks_used
        assert sum(tenant.waiting for tenant in held.tenants) == outputs.stats.waiting
        assert sum(tenant.running for tenant in held.tenants) == outputs.stats.running
        assert sum(tenant.blocks for tenant in held.tenants) >= outputs.stats.kv_blocks_used - 3  # pinned ones
        seen |= {tenant.tenant for tenant in held.tenants}
    assert seen == {"alice", "bob"}


def test_a_look_at_all_blocks_is_taken_now_and_then_and_a_watch_ends(core: EngineCore) -> None:
    now = 0.0
    core._watching = watching = Watching(lambda: now)
    core.handle(Watch(2.0))
    looks = 0
    for tick in range(40):
        now = tick / 10
        assert watching.is_on == (now < 2.0)
        looks += watching.holdings(core.scheduler) is not None
    assert looks == round(2.0 / HOLDINGS_SECONDS)
