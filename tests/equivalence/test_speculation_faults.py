"""What goes wrong while tokens are guessed, or behind a guess, ends no request that would have ended well without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from equivalence.paths import drive, engine

from quire.engine.core import EngineCore
from quire.engine.messages import AddRequest
from quire.engine.sampler import NO_TOKEN_LEFT
from quire.engine.spec.proposer import Draft
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import DraftPass
from quire.scheduler.speculation import FREE_PROBES

# Behind 3 comes 5 and behind 5 comes 3, but nothing may come behind 5 3 5.
DEAD_END = SamplingParams(
    max_tokens=12, temperature=0.0, allowed_token_ids=(3, 5), bad_words=((3, 3), (5, 5), (5, 3, 5, 3)), logprobs=0
)


def answer(core: EngineCore, request: AddRequest) -> tuple[list[int], str | None, str | None]:
    """Tokens, finish reason and error."""
    chunks = core.handle(request)
    while core.has_work:
        chunks += core.step()
    for chunk in chunks:
        assert len(chunk.logprobs or ()) == len(chunk.token_ids)
    return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].finish_reason, chunks[-1].error


PROMPT = [5, 3, 5, 9, 1, 5]


@pytest.mark.parametrize(("stop_token_ids", "reason"), [((), "error"), ((5,), "stop")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["none", "ngram", "layers"])
def test_a_fault_behind_guesses_is_met_where_it_would_be_without_them(
    tiny_model: Path, method, temperature, stop_token_ids, reason
):
    """Tokens before the fault are handed over, and a request that ends among them ends well."""
    model = {"speculative_model": "0"} if method == "layers" else {}
    shape = {} if method == "none" else {"speculative_tree": "chain:4"}
    core = engine(tiny_model, speculative_method=method, speculative_adaptive=False, **shape, **model)
    params = replace(DEAD_END, temperature=temperature, stop_token_ids=stop_token_ids)
    error = NO_TOKEN_LEFT if reason == "error" else None
    assert answer(core, AddRequest("r", PROMPT, params)) == ([3, 5], reason, error)
    assert core.scheduler.counters.drafted > 0 or method == "none"
    assert core.scheduler.counters.draft_failures == 0


def raises() -> None:
    raise MemoryError("broken on purpose")


def tokens(change: Callable[[tuple[int, ...]], tuple[object, ...]]) -> Callable[[Draft], Draft]:
    return lambda draft: draft._replace(tree=draft.tree._replace(tokens=change(draft.tree.tokens)))


def parents(change: Callable[[tuple[int, ...]], tuple[object, ...]]) -> Callable[[Draft], Draft]:
    return lambda draft: draft._replace(tree=draft.tree._replace(parents=change(draft.tree.parents)))


def q(change: Callable[[torch.Tensor], object]) -> Callable[[Draft], Draft]:
    return lambda draft: draft._replace(q=change(draft.q))


DRAFTS: dict[str, Callable[[Draft], object]] = {
    "raises": lambda draft: raises(),
    "no draft": lambda draft: "x",
    "unknown token": tokens(lambda t: (*t[:-1], 300)),
    "negative token": tokens(lambda t: (-1, *t[1:])),
    "text": tokens(lambda t: ("a", *t[1:])),
    "half a token": tokens(lambda t: (t[0] + 0.5, *t[1:])),
    "a number that no message can hold": tokens(lambda t: tuple(np.array(t))),
    "fewer tokens than parents": tokens(lambda t: t[1:]),
    "too many": lambda draft: draft._replace(tree=type(draft.tree)(draft.tree.tokens * 9, draft.tree.parents * 9)),
    "too deep": parents(lambda p: tuple(range(-1, len(p) - 1))),
    "circle": parents(lambda p: tuple(range(len(p)))),
    "no tree": parents(lambda p: (-2, *p[1:])),
    "twins": lambda draft: draft._replace(tree=type(draft.tree)(draft.tree.tokens[:1] * 2, (-1, -1)), q=draft.q[:3]),
    "half a parent": parents(lambda p: (-0.5, *p[1:])),
    "narrow q": q(lambda q: q[:, 1:]),
    "short q": q(lambda q: q[1:]),
    "double q": q(lambda q: q.double()),
    "q is a list": q(lambda q: q.tolist()),
    "q is not a number": q(lambda q: q * float("nan")),
    "q is nothing": q(torch.zeros_like),
    "q is no distribution": q(lambda q: q * 1e6),
    "q is negative": q(lambda q: -q),
}
ANSWERS: dict[str, Callable[[list[Draft], DraftPass], object]] = {
    "nothing": lambda drafts, taken: None,
    "too few": lambda drafts, taken: (drafts[1:], taken),
    "one too many": lambda drafts, taken: ([*drafts, None], taken),
    "no pass": lambda drafts, taken: (drafts, None),
    "another's pass": lambda drafts, taken: (drafts, taken._replace(method="ngram")),
    "endless": lambda drafts, taken: (drafts, taken._replace(seconds=float("inf"))),
    "no time": lambda drafts, taken: (drafts, taken._replace(seconds=float("nan"))),
}


class Broken:
    """A proposer whose answers are spoiled, and how often it was asked."""

    method = "layers"

    def __init__(self, core: EngineCore, spoil: Callable[[list[Draft], DraftPass], object]) -> None:
        self.right, self.spoil, self.asked = core.runner.proposers["layers"], spoil, 0
        core.runner.proposers["layers"] = self
        self.enter = self.right.enter

    def propose(self, views):
        self.asked += len(views)
        return self.spoil(*self.right.propose(views))


def each(spoil: Callable[[Draft], object]) -> Callable[[list[Draft], DraftPass], object]:
    return lambda drafts, taken: ([spoil(draft) for draft in drafts], taken)


SAMPLED = [
    AddRequest(f"r{i}", [i + 1, 7, 31] * 9, SamplingParams(max_tokens=16, n=3, seed=i, ignore_eos=True, logprobs=1))
    for i in range(4)
]
SCARCE = {"num_blocks": 14, "max_num_seqs": 9, "max_model_len": 64}


@pytest.fixture(scope="module")
def unguessed(tiny_model: Path) -> dict[tuple[str, int], tuple[list[int], str]]:
    return drive(engine(tiny_model), [SAMPLED])


@pytest.mark.parametrize(
    "spoil", [*map(each, DRAFTS.values()), *ANSWERS.values()], ids=[*DRAFTS, *(f"answers {name}" for name in ANSWERS)]
)
def test_whoever_is_guessed_nonsense_for_goes_on_without(tiny_model, unguessed, spoil):
    """Samples and preempted ones too: their tokens are those of a run without guesses; each is asked for once."""
    guesses = {"speculative_method": "layers", "speculative_model": "0", "speculative_tree": "rsd-c:2,1"}
    core = engine(tiny_model, speculative_adaptive=False, **guesses, **SCARCE)
    proposer = Broken(core, spoil)
    assert drive(core, [SAMPLED]) == unguessed
    counters = core.scheduler.counters
    assert counters.preemptions > 0
    assert counters.draft_failures == 12
    assert proposer.asked <= 2 * 12  # together, and alone
    assert counters.drafted == 0
    assert core.outputs([]).stats.draft_failures_total == 12


def test_a_slow_proposer_is_hardly_asked(tiny_model, unguessed):
    guesses = {"speculative_method": "layers", "speculative_model": "0", "speculative_tree": "chain:3"}
    core = engine(tiny_model, **guesses)

    def slowly(drafts: list[Draft], taken: DraftPass) -> object:
        time.sleep(0.03)
        return drafts, taken._replace(seconds=taken.seconds + 0.03)

    proposer = Broken(core, slowly)
    request = AddRequest("r", [7, 31, 8], SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True))
    drive(core, [[request]])
    assert 0 < proposer.asked < 4 + FREE_PROBES
