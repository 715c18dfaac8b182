"""Approximate by name, exact by path: with quantized weights or caches, a request's tokens are still those of its solo
run, whatever chunks, batch-mates, cached prefixes and preemptions it meets. fp32 activations.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.messages import AddRequest
from quire.scheduler.params import SamplingParams

PROMPT_LENGTHS = (1, 15, 17, 48, 70, 33)

FORMATS: dict[str, dict[str, object]] = {
    **{name: {"quantization": name} for name in ("int4:32", "int8", "w8a8", "fp8", "fp8_block")},
    **{f"kv-{name}": {"kv_cache_dtype": name} for name in ("fp8", "int8", "int4", "bfloat16")},
    "int8+kv-int4": {"quantization": "int8", "kv_cache_dtype": "int4"},
}
CACHE_NAMES = {"fp8": "fp8_e4m3", "int8": "int8_per_token_head", "int4": "int4_per_token_head", "bfloat16": "bf16"}
PATHS: dict[str, dict[str, object]] = {
    "whole": {},
    "odd_chunks": {"max_num_batched_tokens": 37, "max_num_prefill_tokens": 11},
    "scarce_blocks": {"num_blocks": 7},
    "odd_chunks+scarce_blocks": {"max_num_batched_tokens": 37, "max_num_prefill_tokens": 11, "num_blocks": 7},
}


def requests() -> list[AddRequest]:
    shared, own = [(11 * i + 3) % 256 for i in range(100)], random.Random(0)
    made = []
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = shared[:length] if i % 2 else [own.randrange(256) for _ in range(length)]
        params = SamplingParams(max_tokens=6, temperature=0.0 if i % 3 else 0.8, seed=i, ignore_eos=True)
        made.append(AddRequest(f"r{i}", prompt, params))
    return made


def engine(model: Path, **settings: object) -> EngineCore:
    small = {"dtype": "float32", "threads": 1, "check": True, "block_size": 16, "max_num_seqs": 8, "max_model_len": 96}
    return EngineCore(EngineConfig(model=str(model), **(small | settings)))


def drive(core: EngineCore, requests: list[AddRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.handle(request)
    while core.has_work:
        for chunk in core.step():
            assert chunk.error is None
            tokens[chunk.request_id] += chunk.token_ids
    return tokens


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_the_solo_run(name: str, tiny_model: Path) -> None:
    chosen = FORMATS[name]
    core = engine(tiny_model, prefix_caching=False, **chosen)
    solo = {key: tokens for request in requests() for key, tokens in drive(core, [request]).items()}
    for path in PATHS.values():
        core = engine(tiny_model, **chosen, **path)
        assert drive(core, requests()) == solo
        assert drive(core, requests()) == solo  # this time from the prefix cache
        assert core.scheduler.counters.prefix_hit_tokens > 0
    if "int4" in name:  # or the format was never used
        assert drive(engine(tiny_model), requests()) != solo


def test_formats_are_told_and_part_the_prefix_cache(tiny_model: Path) -> None:
    contexts = set()
    for chosen in ({}, *FORMATS.values()):
        core = engine(tiny_model, **chosen)
        assert core.ready.quantization == chosen.get("quantization", "none")
        assert core.ready.kv_cache_dtype == CACHE_NAMES.get(str(chosen.get("kv_cache_dtype")), "fp32")
        assert set(core.ready.reasons) >= {"quantization", "kv_cache_dtype"}
        contexts.add(core.scheduler.config.cache_context)
    assert len(contexts) == 1 + len(FORMATS)
