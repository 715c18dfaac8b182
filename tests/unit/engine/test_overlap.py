"""Steps planned ahead: what is launched when, what is waited for, and what is drawn in vain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.messages import Abort, AddRequest
from quire.engine.runner import Launched
from quire.scheduler.params import SamplingParams

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def engine(model: Path, **settings: object) -> tuple[EngineCore, list[str]]:
    """An engine that plans ahead, and the names of the runner's steps as they are launched and collected."""
    defaults = {"overlap": True, "dtype": "float32", "threads": 1, "check": True, "max_model_len": 96}
    core = EngineCore(EngineConfig(model=str(model), **(defaults | settings)))
    log: list[str] = []
    launch, collect = core.runner.launch, core.runner.collect

    def launched(plan) -> Launched:
        log.append(f"launch {plan.step_id}")
        return launch(plan)

    def collected(step: Launched):
        log.append(f"collect {step.step_id}")
        return collect(step)

    core.runner.launch, core.runner.collect = launched, collected
    return core, log


def finish(core: EngineCore) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while core.has_work:
        for chunk in core.step():
            tokens.setdefault(chunk.request_id, []).extend(chunk.token_ids)
    return tokens


def test_a_step_is_launched_before_the_one_before_it_is_collected(tiny_model):
    core, log = engine(tiny_model)
    core.handle(AddRequest("a", [1, 2, 3], replace(GREEDY, max_tokens=3)))
    finish(core)
    assert log == ["launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "collect 2"]
    assert core.scheduler.counters.discarded == 0, "its length is known beforehand"


def test_without_overlap_every_step_is_collected_at_once(tiny_model):
    core, log = engine(tiny_model, overlap=False)
    core.handle(AddRequest("a", [1, 2, 3], replace(GREEDY, max_tokens=2)))
    finish(core)
    assert log == ["launch 0", "collect 0", "launch 1", "collect 1"]


def test_a_token_that_ends_a_sample_costs_one_drawn_in_vain(tiny_model):
    core, _ = engine(tiny_model)
    core.handle(AddRequest("a", [1, 2, 3], GREEDY))
    tokens = finish(core)["a"]
    stop = replace(GREEDY, stop_token_ids=(tokens[2],))
    core.handle(AddRequest("b", [1, 2, 3], stop))
    end = tokens.index(tokens[2])
    assert finish(core)["b"] == tokens[: end + 1]
    assert core.scheduler.counters.discarded == 1
    assert core.outputs([]).stats.discarded_tokens_total == 1


def test_who_looks_back_is_waited_for(tiny_model):
    core, log = engine(tiny_model)
    core.handle(AddRequest("a", [1, 2, 3], replace(GREEDY, max_tokens=3, presence_penalty=1.0)))
    core.handle(AddRequest("b", [4, 5], replace(GREEDY, max_tokens=5)))
    finish(core)
    assert log[:6] == ["launch 0", "collect 0", "launch 1", "collect 1", "launch 2", "launch 3"]


def test_a_slot_that_changes_hands_while_a_step_is_out(tiny_model):
    """The result of a step must not reach whoever has the slot by then."""
    alone, _ = engine(tiny_model, max_num_seqs=1)
    alone.handle(AddRequest("next", [9, 8, 7], SamplingParams(max_tokens=8, seed=1, frequency_penalty=0.5)))
    expected = finish(alone)["next"]
    core, log = engine(tiny_model, max_num_seqs=1)
    core.handle(AddRequest("gone", [1, 2, 3], replace(GREEDY, max_tokens=50)))
    for _ in range(3):
        core.step()
    assert log[-2:] == ["launch 3", "collect 2"]
    core.handle(Abort(["gone"]))
    core.handle(AddRequest("next", [9, 8, 7], SamplingParams(max_tokens=8, seed=1, frequency_penalty=0.5)))
    assert finish(core) == {"next": expected}
    assert core.scheduler.counters.discarded == 1


def test_the_logits_kept_for_samples_to_come_are_forgotten_when_their_keeper_ends(tiny_model):
    core, _ = engine(tiny_model, max_num_seqs=1)
    core.handle(AddRequest("a", [1, 2, 3], replace(GREEDY, n=3)))
    core.step()
    core.handle(Abort(["a"]))
    core.handle(AddRequest("b", [4], GREEDY))
    finish(core)
    core.handle(AddRequest("c", [4], GREEDY))
    finish(core)
    assert core.runner._kept == {}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_sample_that_ends_while_its_siblings_are_yet_to_begin(tiny_model, overlap):
    """Sample 0 is aborted in the very step that keeps the prompt's logits: sample 1 computes them anew."""
    core, _ = engine(tiny_model, overlap=overlap, max_num_batched_tokens=64)
    params = SamplingParams(max_tokens=4, seed=3, n=3, ignore_eos=True)
    core.handle(AddRequest("whole", [5] * 20, params))
    whole = [chunk for _ in range(40) for chunk in core.step()]
    core.handle(AddRequest("a", [6] * 20, params))
    if overlap:
        core._launch()
    core.handle(Abort(["a"], index=0))
    rest = [chunk for _ in range(40) for chunk in core.step()]
    assert not core.has_work
    assert {chunk.index for chunk in whole} == {0, 1, 2}
    assert {chunk.index for chunk in rest if chunk.token_ids} == {1, 2}
    assert all(chunk.error is None for chunk in rest)
