"""One bad request ends one request: whatever raises for it, the others get the tokens of their solo run."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.messages import AddRequest
from quire.scheduler.params import SamplingParams

CURSED = 250  # a token that only the bad request has
GOOD = [AddRequest(f"good{i}", [i + 1] * (5 + 9 * i), SamplingParams(max_tokens=6, seed=i)) for i in range(4)]
BAD = AddRequest("bad", [7, 8, CURSED, 9], SamplingParams(max_tokens=6, seed=99, ignore_eos=True))


def engine(model: Path, *, overlap: bool = False) -> EngineCore:
    sizes = {"max_model_len": 96, "max_num_seqs": 8}
    return EngineCore(EngineConfig(model=str(model), dtype="float32", threads=1, check=True, overlap=overlap, **sizes))


def drive(core: EngineCore, requests: list[AddRequest]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Tokens and errors by request."""
    chunks = [chunk for request in requests for chunk in core.handle(request)]
    while core.has_work:
        chunks += core.step()
    tokens: dict[str, list[int]] = {}
    for chunk in chunks:
        tokens.setdefault(chunk.request_id, []).extend(chunk.token_ids)
    assert core.scheduler.pool.num_used == 0
    return tokens, {chunk.request_id: chunk.error for chunk in chunks if chunk.error is not None}


def break_forward(core: EngineCore) -> None:
    forward = core.runner.decoder.forward

    def faulty(batch, cache):
        if (batch.input_ids == CURSED).any():
            raise MemoryError("cursed")
        return forward(batch, cache)

    core.runner.decoder.forward = faulty


def break_logits(core: EngineCore) -> None:
    """NaN for the rows of the bad request, whose hidden states are marked."""
    forward, logits = core.runner.decoder.forward, core.runner.decoder.logits

    def marked(batch, cache):
        hidden = forward(batch, cache)
        hidden[batch.input_ids == 9] = float("nan")
        return hidden

    core.runner.decoder.forward, core.runner.decoder.logits = marked, logits


def break_entering(core: EngineCore) -> None:
    add = core.runner.sampler.add

    def faulty(slot, params, *rest):
        if params.seed == 99:
            raise RuntimeError("cursed")
        add(slot, params, *rest)

    core.runner.sampler.add = faulty


def break_queueing(core: EngineCore) -> None:
    add = core.scheduler.add

    def faulty(request_id, *rest, **named):
        if request_id == "bad":
            raise RuntimeError("cursed")
        add(request_id, *rest, **named)

    core.scheduler.add = faulty


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fault", [break_forward, break_logits, break_entering, break_queueing])
def test_only_the_request_at_fault_ends(tiny_model: Path, fault, overlap):
    expected, errors = drive(engine(tiny_model), GOOD)
    assert errors == {}
    core = engine(tiny_model, overlap=overlap)
    fault(core)
    tokens, errors = drive(core, [GOOD[0], BAD, *GOOD[1:]])
    assert set(errors) == {"bad"}
    assert "cursed" not in errors["bad"]
    assert {name: tokens[name] for name in expected} == expected
    assert core.scheduler.counters.failed == 1
    again, errors = drive(core, [AddRequest("later", GOOD[2].prompt_ids, GOOD[2].params)])
    assert (again["later"], errors) == (expected["good2"], {})


def test_what_the_api_side_forgot_to_check_is_refused_by_the_engine(tiny_model: Path):
    core = engine(tiny_model)
    for prompt, params in (
        ([300], SamplingParams(max_tokens=1)),
        ([], SamplingParams(max_tokens=1)),
        ([1] * 200, SamplingParams(max_tokens=1)),
        ([1], SamplingParams(max_tokens=1, logit_bias={400: 1.0})),
        ([1], SamplingParams(max_tokens=1, temperature=float("nan"))),
        ([1], SamplingParams(max_tokens=1, n=10**9)),
    ):
        _, errors = drive(core, [AddRequest("bad", prompt, params)])
        assert set(errors) == {"bad"}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("when", ["launched", "collected"])
def test_prompt_logprobs_that_fail_end_one_request(tiny_model: Path, monkeypatch, overlap, when):
    expected, _ = drive(engine(tiny_model), GOOD)
    core = engine(tiny_model, overlap=overlap)
    rate = core.runner.sampler.rate

    def faulty(logits, target_ids, k):
        if when == "launched":
            raise MemoryError("cursed")
        return rate(logits * float("nan"), target_ids, k)

    monkeypatch.setattr(core.runner.sampler, "rate", faulty)
    bad = AddRequest("bad", [7, 8, 9], SamplingParams(max_tokens=6, prompt_logprobs=1))
    tokens, errors = drive(core, [*GOOD, bad])
    assert set(errors) == {"bad"}
    assert {name: tokens[name] for name in expected} == expected
