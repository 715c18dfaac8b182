"""One bad request ends one request: whatever raises for it, the others get the tokens of their solo run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from quire.engine import runner
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.messages import Abort, AddRequest
from quire.engine.sequence_state import SequenceState
from quire.scheduler.params import SamplingParams

CURSED = 250  # a token that only the bad request has
GOOD = [AddRequest(f"good{i}", [i + 1] * (5 + 9 * i), SamplingParams(max_tokens=6, seed=i)) for i in range(4)]
BAD = AddRequest(
    "bad", [*range(20), 7, 8, CURSED, 9], SamplingParams(max_tokens=12, seed=99, ignore_eos=True, logprobs=1)
)


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


def of_bad(call, names_it):
    """`call`, which raises where `names_it(*arguments)`."""

    def faulty(*arguments, **named):
        if names_it(*arguments):
            raise MemoryError("cursed")
        return call(*arguments, **named)

    return faulty


def break_drawing(core: EngineCore) -> None:
    """The draw of a whole batch raises as long as the bad request is in it."""
    sampler = core.runner.sampler
    sampler.choose = of_bad(sampler.choose, lambda logits, states, *rest: any(s.params.seed == 99 for s in states))


def break_logprobs_of_draws(core: EngineCore) -> None:
    """What is drawn is drawn by then, and is drawn again."""
    sampler = core.runner.sampler
    sampler._logprobs = of_bad(sampler._logprobs, lambda logits, ids, rivals: True)


def break_learning(core: EngineCore) -> None:
    enter = core.runner.sampler.add

    def add(slot, params, *rest):
        enter(slot, params, *rest)
        if params.seed == 99:
            state = core.runner.sampler._slots[slot]
            core.runner.sampler._slots[slot] = Unteachable(state)

    core.runner.sampler.add = add


class Unteachable:
    """A sequence's state that cannot take in what was drawn."""

    def __init__(self, state):
        self.__dict__["state"] = state

    def __getattr__(self, name):
        return getattr(self.state, name)

    def __setattr__(self, name, value):
        setattr(self.state, name, value)

    def append(self, token):
        raise MemoryError("cursed")


def break_taking(core: EngineCore) -> None:
    scheduler = core.scheduler
    scheduler._take = of_bad(scheduler._take, lambda request, *rest: request.request_id == "bad")


def break_publishing(core: EngineCore) -> None:
    """A token has been appended by then."""
    prefix = core.scheduler.residency.prefix
    prefix.publish = of_bad(prefix.publish, lambda request, *rest: request.request_id == "bad")


def break_admission(core: EngineCore) -> None:
    residency = core.scheduler.residency
    residency.enter = of_bad(residency.enter, lambda request, *rest: request.request_id == "bad")


def break_growth(core: EngineCore) -> None:
    """In the middle of making a plan: others have their rows already, and blocks for them."""
    residency = core.scheduler.residency
    residency.grow = of_bad(residency.grow, lambda request: request.request_id == "bad" and request.num_output > 2)


def break_looking(core: EngineCore) -> None:
    prefix = core.scheduler.residency.prefix
    prefix.look = of_bad(prefix.look, lambda request: request.request_id == "bad")


PLANNING = [break_admission, break_growth, break_looking]
STEPPING = [break_drawing, break_logprobs_of_draws, break_learning, break_taking, break_publishing]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fault", [break_forward, break_logits, break_entering, break_queueing, *PLANNING, *STEPPING])
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

    def faulty(logits, ids, rivals):
        if rivals[0] == 2:
            raise MemoryError("cursed")
        return logprobs(logits, ids, rivals)

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


def test_a_fault_of_planning_that_is_nobodys_is_not_laid_on_anybody(tiny_model: Path):
    core = engine(tiny_model)
    for request in GOOD:
        core.handle(request)
    core.scheduler._budget = of_bad(core.scheduler._budget, lambda *arguments: True)
    with pytest.raises(MemoryError):
        core.step()


def test_what_cannot_be_aborted_disturbs_nobody(tiny_model: Path):
    expected, _ = drive(engine(tiny_model), GOOD)
    core = engine(tiny_model)
    core.scheduler.abort = of_bad(core.scheduler.abort, lambda request_id, index: request_id == "bad")
    for request in (*GOOD, BAD):
        core.handle(request)
    assert core.handle(Abort(["bad"])) == []
    tokens, errors = drive(core, [])
    assert {name: tokens[name] for name in expected} == expected
    assert errors == {}


LAST = 90  # a token that nobody else has
ASK = AddRequest("ask", [*range(40, 80), LAST], SamplingParams(max_tokens=6, seed=5))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("what", ["K/V of a block", "a row of the embedding"])
def test_what_is_no_number_ends_who_reads_it_and_is_kept_for_nobody(tiny_model: Path, what, overlap):
    """A cell of the memory goes bad: whoever has it in sight ends with an error, nobody else sees anything of it, and
    the same prompt is right again once the cell is."""
    expected, _ = drive(engine(tiny_model), [*GOOD, ASK])
    core = engine(tiny_model, overlap=overlap)
    drive(core, [ASK])
    if what == "K/V of a block":
        cell = core.runner.cache[0].k[next(iter(core.scheduler.pool._by_key.values()))]
    else:
        cell = embedding(core)[LAST]
    healthy = cell.clone()
    cell.fill_(float("nan"))
    tokens, errors = drive(core, [GOOD[0], replace(ASK, request_id="hit"), *GOOD[1:]])
    assert "NaN" in errors.pop("hit")
    assert errors == {}
    assert {request.request_id: tokens[request.request_id] for request in GOOD} == {
        request.request_id: expected[request.request_id] for request in GOOD
    }
    assert core.outputs([]).stats.nan_total == 1
    cell.copy_(healthy)
    again, errors = drive(core, [replace(ASK, request_id="again")])
    assert (again["again"], errors) == (expected["ask"], {})


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("step_tokens", [8, 64], ids=["in a chunk", "in the row that draws"])
def test_a_bad_block_ends_the_first_who_shares_it_and_no_other(tiny_model: Path, step_tokens, overlap):
    """The cell stays as it is: the next one computes the prompt anew, in blocks of its own."""
    expected, _ = drive(engine(tiny_model), [ASK])
    core = engine(tiny_model, overlap=overlap, max_num_batched_tokens=step_tokens)
    drive(core, [ASK])
    core.runner.cache[0].k[next(iter(core.scheduler.pool._by_key.values()))].fill_(float("nan"))
    _, errors = drive(core, [replace(ASK, request_id="hit")])
    assert set(errors) == {"hit"}
    again, errors = drive(core, [replace(ASK, request_id="again")])
    assert errors == {}
    assert again["again"] == expected["ask"]


END = 257  # of the tiny model
NO_TOKEN = SamplingParams(max_tokens=4, min_tokens=3, allowed_token_ids=(END,))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_fails_takes_no_prompt_out_of_the_cache(tiny_model: Path, monkeypatch, overlap):
    core = engine(tiny_model, overlap=overlap)
    assert core.scheduler.config.eos_token_ids == {END}
    drive(core, [ASK])
    hits = core.scheduler.counters.prefix_hit_tokens
    forward = core.runner.decoder.forward
    monkeypatch.setattr(
        core.runner.decoder, "forward", of_bad(forward, lambda batch, cache: (batch.input_ids == CURSED).any())
    )
    prompts = {
        "no token left": AddRequest("no token left", ASK.prompt_ids, NO_TOKEN),
        "the model": AddRequest("the model", [*ASK.prompt_ids, CURSED], ASK.params),
    }
    _, errors = drive(core, list(prompts.values()))
    assert set(errors) == set(prompts)
    drive(core, [replace(ASK, request_id="later")])
    assert core.scheduler.counters.prefix_hit_tokens - hits == 3 * 32


@pytest.mark.parametrize("overlap", [False, True])
def test_no_block_of_a_prompt_that_is_no_number_enters_the_cache(tiny_model: Path, overlap):
    """Nothing is drawn behind the first pieces of a prompt, and others could share them before anything is."""
    core = engine(tiny_model, overlap=overlap, max_num_batched_tokens=16)
    embedding(core)[LAST].fill_(float("nan"))
    chunks = core.handle(AddRequest("bad", [*range(40), LAST, *range(50)], SamplingParams(max_tokens=3)))
    published = 0
    while core.has_work:
        chunks += core.step()
        for block in core.scheduler.pool._by_key.values():
            published += 1
            assert all(
                layer.k[block].isfinite().all() and layer.v[block].isfinite().all() for layer in core.runner.cache
            )
    assert published, "the blocks before the bad token are good ones"
    assert [chunk.finish_reason for chunk in chunks] == ["error"]


def embedding(core: EngineCore) -> torch.Tensor:
    decoder = core.runner.decoder
    return getattr(decoder, "_decoder", decoder).embedding
