"""Exact where it says exact: a request's tokens are those of its solo run, whatever path its tokens took.

Paths: any chunking, any batch-mates and arrivals, prefix hits, preemption, sibling samples, steps planned ahead, CUDA
graphs, guesses by lookup, every kernel implementation; and each pair of them. fp32, greedy and seeded sampling alike.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
from equivalence.paths import GREEDY, PATHS, SAMPLED, combined, drive, engine, requests

from quire.engine.messages import Abort, AddRequest
from quire.scheduler.params import SamplingParams


@pytest.fixture(scope="module")
def solo(tiny_model: Path) -> dict[tuple[str, int], tuple[list[int], str]]:
    """Each request alone, in one chunk, without a cache, through the references."""
    core = engine(tiny_model, prefix_caching=False, kernels={"attention": "reference", "linear": "reference"})
    results = {}
    for request in requests():
        results |= drive(core, [[request]])
    return results


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
