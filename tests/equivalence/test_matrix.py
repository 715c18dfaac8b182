"""Exact where it says exact: a request's tokens are those of its solo run, whatever path its tokens took.

Paths: any chunking, any batch-mates and arrivals, prefix hits, preemption, sibling samples, steps planned ahead, CUDA
graphs, every kernel implementation; and each pair of them. fp32, greedy and seeded sampling alike.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.graphs import Graphs
from quire.engine.messages import Abort, AddRequest
from quire.scheduler.params import SamplingParams, Slo

PROMPT_LENGTHS = (1, 15, 16, 17, 48, 70, 7, 33)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
SAMPLED = [
    SamplingParams(max_tokens=8, seed=5, ignore_eos=True),
    SamplingParams(max_tokens=8, seed=6, temperature=0.7, top_p=0.9, top_k=50, min_p=0.01),
    SamplingParams(max_tokens=8, seed=7, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(max_tokens=8, temperature=0.0, logit_bias={5: 30.0}, min_tokens=4, stop_token_ids=(5, 6)),
    SamplingParams(max_tokens=8, seed=8, allowed_token_ids=(1, 2, 3, 9), bad_words=((1, 2), (3,))),
    SamplingParams(max_tokens=7, seed=9, n=3),
]


def requests() -> list[AddRequest]:
    """Prompts with and without a shared beginning, greedy and sampled in turn."""
    shared = [(11 * i + 3) % 256 for i in range(100)]
    own = random.Random(0)
    made = []
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = shared[:length] if i % 2 else [own.randrange(256) for _ in range(length)]
        if length > 40:
            prompt[-5:] = [own.randrange(256) for _ in range(5)]
        params = GREEDY if i % 3 == 0 else SAMPLED[i % len(SAMPLED)]
        # Promises and tenants change who runs when, under the policies that heed them, and nothing else.
        slo = Slo(ttft=0.01 + 0.1 * i, itl=0.05 if i % 4 == 0 else None, deadline=3600.0 if i % 2 else None)
        made.append(AddRequest(f"r{i}", prompt, params, arrival=time.monotonic(), tenant=f"t{i % 3}", slo=slo))
    return made


def drive(core: EngineCore, arrivals: list[list[AddRequest | Abort]]) -> dict[tuple[str, int], tuple[list[int], str]]:
    """Run to the end; arrivals[i] come in before step i. Tokens and finish reason by (request, sample)."""
    tokens: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], str] = {}
    step = 0
    while core.has_work or step < len(arrivals):
        chunks = [c for message in (arrivals[step] if step < len(arrivals) else []) for c in core.handle(message)]
        for chunk in chunks + core.step():
            assert chunk.error is None
            tokens.setdefault((chunk.request_id, chunk.index), []).extend(chunk.token_ids)
            if chunk.finish_reason:
                reasons[chunk.request_id, chunk.index] = chunk.finish_reason
        step += 1
        assert step < 5000
    assert core.scheduler.pool.num_used == 0
    return {name: (tokens[name], reasons[name]) for name in tokens}


def engine(model: Path, **settings: object) -> EngineCore:
    defaults = {
        "dtype": "float32",
        "threads": 1,
        "check": True,
        "block_size": 16,
        "max_num_seqs": 16,
        "max_model_len": 96,
    }
    settings = defaults | settings
    replayed = settings.pop("replayed", False)
    core = EngineCore(EngineConfig(model=str(model), **settings))
    if replayed:  # as CUDA graphs are: filled up to a shape, on persistent inputs
        runner = core.runner
        runner.graphs = Graphs(lambda batch: runner.decoder.forward(batch, runner.cache), runner.slots, lambda f: f)
    return core


@pytest.fixture(scope="module")
def solo(tiny_model: Path) -> dict[tuple[str, int], tuple[list[int], str]]:
    """Each request alone, in one chunk, without a cache, through the references."""
    core = engine(tiny_model, prefix_caching=False, kernels={"attention": "reference", "linear": "reference"})
    results = {}
    for request in requests():
        results |= drive(core, [[request]])
    return results


PATHS: dict[str, dict[str, object]] = {
    "whole": {},
    "few_tokens": {"max_num_batched_tokens": 16, "max_num_prefill_tokens": 2},
    "odd_chunks": {"max_num_batched_tokens": 37, "max_num_prefill_tokens": 11},
    "few_slots": {"max_num_seqs": 3},
    "scarce_blocks": {"num_blocks": 7},
    "no_cache": {"prefix_caching": False},
    "tiny_blocks": {"block_size": 1},
    "slo": {"slo_itl_ms": 1.0},
    "equal_time": {"prefill_chunking": "time", "max_num_batched_tokens": 64},
    "fair": {"scheduling_policy": "fair", "tenant_weights": {"t0": 1.0, "t1": 5.0, "t2": 1.0}},
    "deadline": {"scheduling_policy": "deadline"},
    "overlap": {"overlap": True},
    "graphs": {"replayed": True},
    "predicted_eviction": {"prefix_eviction": "discard", "num_blocks": 15},
    "torch_kernels": {"kernels": dict.fromkeys(("attention", "rope", "rms_norm", "add_rms_norm", "kv_write"), "cpu")},
    "reference_kernels": {"kernels": {"attention": "reference", "linear": "reference", "rope": "reference"}},
}


def combined(names: tuple[str, ...]) -> dict[str, object]:
    settings: dict[str, object] = {}
    for name in names:
        settings |= PATHS[name]
    if settings.get("block_size") == 1 and "num_blocks" in settings:
        settings["num_blocks"] = (settings["num_blocks"] - 1) * 16 + 1  # as many tokens as before
    return settings


@pytest.mark.parametrize("names", [*((n,) for n in PATHS), *itertools.combinations(PATHS, 2)], ids="+".join)
def test_tokens_are_those_of_the_solo_run(tiny_model, solo, names):
    core = engine(tiny_model, **combined(names))
    assert drive(core, [requests()]) == solo


def test_scarce_blocks_do_preempt(tiny_model, solo):
    core = engine(tiny_model, **PATHS["scarce_blocks"])
    assert drive(core, [requests()]) == solo
    assert core.scheduler.counters.preemptions > 0


def test_second_time_around_comes_from_the_cache(tiny_model, solo):
    core = engine(tiny_model)
    assert drive(core, [requests()]) == solo
    before = core.scheduler.counters.prefix_hit_tokens
    assert drive(core, [requests()]) == solo
    assert core.scheduler.counters.prefix_hit_tokens > before + 100


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_seqs": 3}, {"num_blocks": 8}, {"prefix_caching": False}, {"overlap": True}]
)
def test_many_samples_do_not_depend_on_how_many_run_at_once(tiny_model, settings):
    """Sample j of n is what it would be alone; all first tokens come from one row of logits, however late."""
    prompt = [(7 * i) % 256 for i in range(41)]
    params = SamplingParams(max_tokens=6, seed=3, n=24, ignore_eos=True)
    alone = drive(engine(tiny_model), [[AddRequest("r", prompt, replace(params, n=1))]])
    core = engine(tiny_model, **settings)
    got = drive(core, [[AddRequest("r", prompt, params)]])
    assert len(got) == 24
    assert len({tuple(tokens) for tokens, _ in got.values()}) > 12
    assert got["r", 0] == alone["r", 0]
    assert got == drive(engine(tiny_model, max_num_seqs=1), [[AddRequest("r", prompt, params)]])
    if "num_blocks" not in settings:
        assert core.scheduler.counters.prompt_tokens == len(prompt)
    drive(core, [[AddRequest("next", prompt, GREEDY)]])
    assert core.runner._kept == {}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_any_arrivals_and_aborted_mates(tiny_model, solo, seed, overlap):
    """Requests come in at random steps among others that are aborted at random steps."""
    rng = random.Random(seed)
    arrivals: list[list[AddRequest | Abort]] = [[] for _ in range(60)]
    for request in requests():
        arrivals[rng.randrange(30)].append(request)
    for i in range(8):
        mate = AddRequest(f"mate{i}", [rng.randrange(256) for _ in range(rng.randrange(1, 80))], SAMPLED[i % 6])
        start = rng.randrange(30)
        arrivals[start].append(mate)
        arrivals[start + rng.randrange(1, 20)].append(Abort([mate.request_id]))
    sizes = {"num_blocks": rng.choice([7, 20, 200]), "max_num_batched_tokens": rng.choice([16, 50, 400])}
    core = engine(tiny_model, overlap=overlap, **sizes)
    got = drive(core, arrivals)
    ended = sum(message.params.n for messages in arrivals for message in messages if isinstance(message, AddRequest))
    assert core.scheduler.counters.discarded <= (ended if overlap else 0)
    assert {name: result for name, result in got.items() if not name[0].startswith("mate")} == solo


def test_prompt_logprobs_do_not_depend_on_the_path(tiny_model):
    prompt = [(5 * i) % 256 for i in range(80)]
    request = AddRequest("p", prompt, SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2))
    collected = []
    in_chunks = {"max_num_batched_tokens": 16, "max_num_prefill_tokens": 3}
    for settings in ({}, in_chunks, {"num_blocks": 7}, {"overlap": True}, {"overlap": True} | in_chunks):
        core = engine(tiny_model, **settings)
        for _ in range(2):  # the second time the prompt is in the cache, and is computed all the same
            core.handle(request)
            pieces = []
            while core.has_work:
                for chunk in core.step():
                    pieces += chunk.prompt_logprobs or []
            collected.append(pieces)
    assert all(len(pieces) == len(prompt) - 1 for pieces in collected)
    assert [p.token_id for p in collected[0]] == prompt[1:]
    for pieces in collected[1:]:
        assert [p.logprob for p in pieces] == pytest.approx([p.logprob for p in collected[0]], abs=1e-4)
