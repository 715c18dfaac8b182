"""Tokens do not depend on whether a prefix that sequences share is read once for all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from quire.engine import slots
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.messages import AddRequest
from quire.scheduler.params import SamplingParams

RNG = random.Random(0)
SYSTEM = [RNG.randrange(256) for _ in range(300)]


def requests() -> list[AddRequest]:
    """Samples of one prompt, users of one system prompt who end at different times, and one who shares nothing."""
    own = [[RNG.randrange(256) for _ in range(3 + 5 * i)] for i in range(5)]
    greedy = [SamplingParams(max_tokens=8 + 3 * i, temperature=0.0, ignore_eos=True) for i in range(5)]
    made = [AddRequest(f"user{i}", SYSTEM + own[i], greedy[i]) for i in range(5)]
    made.append(AddRequest("samples", SYSTEM + own[4], SamplingParams(max_tokens=14, seed=3, n=6, ignore_eos=True)))
    made.append(AddRequest("stranger", own[4] + SYSTEM, greedy[4]))
    return made


def tokens(model: Path, dtype: str, kernels: dict[str, str], asked: Sequence[AddRequest]) -> dict[object, list[int]]:
    config = EngineConfig(
        model=str(model), dtype=dtype, threads=1, max_num_seqs=16, max_model_len=400, kernels=kernels, check=True
    )
    core = EngineCore(config)
    drawn: dict[object, list[int]] = {}
    for request in asked:
        core.handle(request)
    while core.has_work:
        for chunk in core.step():
            assert chunk.error is None
            drawn.setdefault((chunk.request_id, chunk.index), []).extend(chunk.token_ids)
    return drawn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_without_groups(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    sizes = []

    def counted(*arguments: object) -> object:
        groups = find(*arguments)  # type: ignore[arg-type]
        sizes.append(max((len(group.seqs) for group in groups), default=0))
        return groups

    find = slots.find_shared_prefixes
    asked = requests()
    monkeypatch.setattr(slots, "find_shared_prefixes", counted)
    grouped = tokens(tiny_model, dtype, {}, asked)
    assert max(sizes) >= 8  # users and samples together
    assert len({size for size in sizes if size > 1}) > 2  # and then fewer
    monkeypatch.setattr(slots, "find_shared_prefixes", lambda *arguments: ())
    assert grouped == tokens(tiny_model, dtype, {}, asked)
    if dtype == "float32":
        assert grouped == tokens(tiny_model, dtype, {"attention": "reference"}, asked)
