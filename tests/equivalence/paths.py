"""Requests of every kind, an engine to drive by hand, and the paths that tokens may take through it."""

from __future__ import annotations

import random
import time
from pathlib import Path

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
            assert chunk.error is None, chunk.error
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
    "lookup": {"speculative_method": "ngram", "speculative_adaptive": False},
    "lookup_trees": {"speculative_method": "ngram", "speculative_tree": "rsd-s:2x3", "speculative_adaptive": False},
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
