"""One bad request ends one request: whatever raises for it, the others get the tokens of their solo run."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.engine import runner
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.messages import AddRequest
from quire.engine.sequence_state import SequenceState
from quire.scheduler.params import SamplingParams

CURSED = 250  # a token that only the bad request has
GOOD = [AddRequest(f"good{i}", [i + 1] * (5 + 9 * i), SamplingParams(max_tokens=6, seed=i)) for i in range(4)]
BAD = AddRequest("bad", [7, 8, CURSED, 9], SamplingParams(max_tokens=6, seed=99, ignore_eos=True))


def engine(model: Path, **settings: object) -> EngineCore:
    sizes = {"max_model_len": 96, "max_num_seqs": 8}
    return EngineCore(EngineConfig(model=str(model), dtype="float32", threads=1, check=True, **sizes, **settings))


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


GUESSING = [
    AddRequest(f"good{i}", [i + 1, 7, i + 2, 9] * (2 + i), SamplingParams(max_tokens=9, seed=i, **more))
    for i, more in enumerate(
        ({"temperature": 0.0}, {"frequency_penalty": -2.0, "logprobs": 1}, {"bad_words": ((9, 9),)})
    )
]
BAD_GUESSING = AddRequest("bad", [7, 8, 9] * 3, SamplingParams(max_tokens=9, seed=99, logprobs=2, ignore_eos=True))


def judge_raises(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bad one among them, when everything has been computed."""
    judge = runner.judge

    def faulty(sampler, logits, slots, positions, drafts):
        if any(state.seed == 99 for state in sampler.states(slots)):
            raise MemoryError("cursed")
        return judge(sampler, logits, slots, positions, drafts)

    monkeypatch.setattr(runner, "judge", faulty)


def logprobs_raise(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bad one alone: so the verdict on the others has been reached by then, and must not be reached twice."""
    logprobs = core.runner.sampler.logprobs

    def faulty(logits, ids, k):
        if k == 2:
            raise MemoryError("cursed")
        return logprobs(logits, ids, k)

    monkeypatch.setattr(core.runner.sampler, "logprobs", faulty)


def state_raises(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    append = SequenceState.append

    def faulty(state, token):
        if state.seed == 99 and state.num_drawn > 1:
            raise MemoryError("cursed")
        append(state, token)

    monkeypatch.setattr(SequenceState, "append", faulty)


@pytest.fixture
def guessing(tiny_model: Path) -> EngineCore:
    """Every decode comes with guesses, which the target's own layers make: of what is drawn some stay."""
    guesses = {"speculative_method": "layers", "speculative_model": "0", "speculative_tree": "rsd-c:2,1"}
    return engine(tiny_model, speculative_adaptive=False, **guesses)


@pytest.mark.parametrize("fault", [judge_raises, logprobs_raise, state_raises])
def test_a_verification_that_fails_ends_one_request(
    guessing: EngineCore, monkeypatch: pytest.MonkeyPatch, fault
) -> None:
    expected, errors = drive(guessing, GUESSING)
    assert errors == {}
    drafted = guessing.scheduler.counters.drafted
    assert drafted > 0
    fault(guessing, monkeypatch)
    tokens, errors = drive(guessing, [GUESSING[0], BAD_GUESSING, *GUESSING[1:]])
    assert set(errors) == {"bad"}
    assert "cursed" not in errors["bad"]
    assert {name: tokens[name] for name in expected} == expected
    assert guessing.scheduler.counters.drafted >= 2 * drafted
    monkeypatch.undo()
    assert drive(guessing, GUESSING) == (expected, {})


@pytest.mark.parametrize("learned", [False, True])
def test_verdicts_that_are_reached_twice_are_caught(
    guessing: EngineCore, monkeypatch: pytest.MonkeyPatch, learned: bool
) -> None:
    """Every sequence is judged again alone. States that had learned of the first verdict would count tokens twice."""
    expected, _ = drive(guessing, GUESSING)
    judge = runner.judge

    def faulty(sampler, logits, slots, positions, drafts):
        if learned or len(slots) == 1:
            verdicts = judge(sampler, logits, slots, positions, drafts)
        if len(slots) > 1:
            raise MemoryError("cursed")
        return verdicts

    monkeypatch.setattr(runner, "judge", faulty)
    tokens, errors = drive(guessing, GUESSING)
    assert errors == {}
    assert (tokens == expected) is not learned


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
