"""Guessing changes how fast tokens come, and not which.

Greedy requests, and those whose guesses are a function of the past, say with guesses what they say without, token by
token, on every path of paths.py. What is drawn behind guesses that were drawn themselves has the same
distribution, which test_sampled_speculation.py shows; here it is held to its seed.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
from equivalence.paths import GREEDY, PATHS, combined, drive, engine, requests

from quire.bench.speculative import SpeculativeConfig, held_out_prompts
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.messages import Abort, AddRequest
from quire.engine.spec.model import ModelProposer
from quire.scheduler.params import SamplingParams, Speculative

# Prompts that repeat themselves, so that look-ups find something; what a random model says soon does as well.
MOTIF = [7, 31, 8, 90, 14]

METHODS: dict[str, dict[str, object]] = {
    "ngram": {"speculative_method": "ngram"},
    "layers": {"speculative_method": "layers", "speculative_model": "0"},
    "nested": {"speculative_method": "nested", "speculative_model": "h/2"},
    "draft": {"speculative_method": "draft"},
}
SHAPES = ("chain:3", "rsd-c:2,2", "rsd-s:3x2")
FIXED = {"speculative_adaptive": False}


def repeating(greedy_only: bool) -> list[AddRequest]:
    """Requests of every kind whose prompts repeat; of models' guesses only greedy ones keep their tokens."""
    made = []
    for i, request in enumerate(requests()):
        prompt = (MOTIF * 20)[i : i + len(request.prompt_ids)]
        params = request.params
        if greedy_only:
            named = (5, 250) if i % 4 == 1 else ()
            params = replace(params, temperature=0.0, n=1, logprobs=2 if i % 2 else None, logprob_token_ids=named)
        made.append(AddRequest(f"r{i}", prompt, params, arrival=request.arrival, tenant=request.tenant))
    return made


def settings_of(method: str, model: Path) -> dict[str, object]:
    settings = dict(METHODS[method])
    if method == "draft":  # as good as a draft can be, and with a cache of its own
        settings["speculative_model"] = str(model)
    return settings | FIXED


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> dict[bool, dict[tuple[str, int], tuple[list[int], str]]]:
    """Each request alone, without guesses: all kinds, and greedy ones."""
    core = engine(tiny_model, prefix_caching=False)
    found: dict[bool, dict[tuple[str, int], tuple[list[int], str]]] = {}
    for greedy_only in (False, True):
        found[greedy_only] = {}
        for request in repeating(greedy_only):
            found[greedy_only] |= drive(core, [[request]])
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_shape(tiny_model, plain, method, shape):
    core = engine(tiny_model, speculative_tree=shape, **settings_of(method, tiny_model))
    assert drive(core, [repeating(method != "ngram")]) == plain[method != "ngram"]
    counters = core.scheduler.counters
    assert counters.drafted > 3
    assert counters.accepted > 0
    assert counters.draft_failures == 0


@pytest.mark.parametrize(
    ("method", "shape", "names"),
    [
        (method, SHAPES[i % len(SHAPES)], names)
        for i, (method, names) in enumerate(
            itertools.product(("layers", "draft"), [n for n in PATHS if not n.startswith("lookup")])
        )
    ],
)
def test_models_guess_on_every_path(tiny_model, plain, method, shape, names):
    core = engine(tiny_model, speculative_tree=shape, **settings_of(method, tiny_model), **combined((names,)))
    assert drive(core, [repeating(True)]) == plain[True]
    if "slo_itl_ms" not in PATHS[names]:  # a promise may leave a slow machine no room for guesses
        assert core.scheduler.counters.drafted > 0


def test_a_draft_that_is_its_target_is_always_right(tiny_model):
    core = engine(tiny_model, speculative_tree="chain:3", **settings_of("draft", tiny_model))
    drive(core, [[AddRequest("a", MOTIF * 4, replace(GREEDY, max_tokens=13))]])
    assert core.scheduler.counters.accepted == core.scheduler.counters.drafted > 0


def test_a_draft_model_may_know_fewer_tokens(tiny_model, narrow_model, plain):
    settings = settings_of("draft", narrow_model)
    core = engine(tiny_model, speculative_tree="rsd-c:2,2", **settings)
    assert drive(core, [repeating(True)]) == plain[True]
    assert core.scheduler.counters.accepted > 0
    assert core.scheduler.counters.draft_failures == 0


def test_every_request_has_its_own_method_and_length(tiny_model, plain):
    wishes = itertools.cycle(
        [
            Speculative(),
            Speculative(method="none"),
            Speculative(method="ngram"),
            Speculative(num_tokens=1),
            Speculative(method="ngram", num_tokens=2),
        ]
    )
    core = engine(tiny_model, speculative_tree="chain:4", **settings_of("layers", tiny_model))
    asked = [
        AddRequest(r.request_id, r.prompt_ids, r.params, speculative=wish)
        for r, wish in zip(repeating(True), wishes, strict=False)
    ]
    assert drive(core, [asked]) == plain[True]


def test_the_controller_decides_how_much_and_never_what(tiny_model, plain):
    core = engine(tiny_model, speculative_tree="rsd-s:2x3", speculative_method="ngram")
    assert drive(core, [repeating(False)]) == plain[False]


@pytest.mark.parametrize("seed", range(3))
def test_arrivals_and_aborts_among_guesses(tiny_model, plain, seed):
    rng = random.Random(seed)
    arrivals: list[list[AddRequest | Abort]] = [[] for _ in range(50)]
    for request in repeating(True):
        arrivals[rng.randrange(20)].append(request)
    for i in range(8):
        mate = AddRequest(f"mate{i}", [rng.randrange(256) for _ in range(rng.randrange(1, 80))], GREEDY)
        start = rng.randrange(20)
        arrivals[start].append(mate)
        arrivals[start + rng.randrange(1, 20)].append(Abort([mate.request_id]))
    sizes = {"num_blocks": rng.choice([8, 20, 200]), "max_num_batched_tokens": rng.choice([16, 50, 400])}
    core = engine(tiny_model, speculative_tree=SHAPES[seed], **settings_of("draft", tiny_model), **sizes)
    got = drive(core, arrivals)
    assert {name: result for name, result in got.items() if not name[0].startswith("mate")} == plain[True]


def test_drawn_guesses_answer_to_the_seed(tiny_model):
    """The same request, alone and among others, on any path: the same tokens, as long as its guesses are the same."""
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=11, ignore_eos=True)
    tokens = []
    for mates in (0, 3):
        core = engine(tiny_model, speculative_tree="rsd-s:3x2", **settings_of("layers", tiny_model))
        asked = [AddRequest("r", MOTIF * 3, params)]
        asked += [AddRequest(f"m{i}", MOTIF * (2 + i), replace(params, seed=i)) for i in range(mates)]
        tokens.append(drive(core, [asked])["r", 0])
        assert core.scheduler.counters.drafted > 0
    assert tokens[0] == tokens[1]


class Broken:
    """A proposer that fails in the way asked for, for sequences of odd slots."""

    method = "layers"

    def __init__(self, proposer: ModelProposer, how: str) -> None:
        self.proposer, self.how = proposer, how

    def enter(self, slot: int) -> None:
        self.proposer.enter(slot)

    def propose(self, views):
        drafts, taken = self.proposer.propose(views)
        for i, view in enumerate(views):
            if view.slot % 2 == 0:
                continue
            if self.how == "raises":
                raise RuntimeError("broken on purpose")
            tree = drafts[i].tree
            wrong = {
                "unknown token": tree._replace(tokens=(*tree.tokens[:-1], 10**6)),
                "too many": tree._replace(tokens=tree.tokens * 40, parents=tree.parents * 40),
                "circle": tree._replace(parents=tuple(range(len(tree.tokens)))),
            }[self.how]
            drafts[i] = drafts[i]._replace(tree=wrong)
        return drafts, taken


@pytest.mark.parametrize("how", ["raises", "unknown token", "too many", "circle"])
def test_a_broken_proposer_costs_its_guesses_and_nothing_else(tiny_model, plain, how):
    core = engine(tiny_model, speculative_tree="chain:3", **settings_of("layers", tiny_model))
    proposer = core.runner.proposers["layers"]
    core.runner.proposers["layers"] = Broken(proposer, how)
    assert drive(core, [repeating(True)]) == plain[True]
    assert core.scheduler.counters.draft_failures > 0
    assert core.scheduler.counters.accepted > 0  # of the others


def greedy_on_the_bundled_family(prompts: list[list[int]], **settings: object) -> tuple[list[list[int]], EngineCore]:
    core = EngineCore(
        EngineConfig(dtype="float32", threads=1, max_num_seqs=50, max_num_batched_tokens=1024, **FIXED | settings)
    )
    asked = [AddRequest(f"{i}", ids, SamplingParams(max_tokens=24, temperature=0.0)) for i, ids in enumerate(prompts)]
    got = drive(core, [asked])
    return [got[f"{i}", 0][0] for i in range(len(prompts))], core


BUNDLED = {
    "ngram": {"speculative_method": "ngram", "speculative_tree": "chain:4"},
    "draft": {"speculative_method": "draft", "speculative_model": "bundled", "speculative_tree": "rsd-s:3x4"},
    "nested h/2": {"speculative_method": "nested", "speculative_model": "h/2", "speculative_tree": "rsd-c:2,2,1"},
    "nested h/4": {"speculative_method": "nested", "speculative_model": "h/4", "speculative_tree": "chain:5"},
    "nested h/8": {"speculative_method": "nested", "speculative_model": "128", "speculative_tree": "chain:5"},
    "layers": {"speculative_method": "layers", "speculative_model": "0,3,6", "speculative_tree": "rsd-s:2x3"},
}


@pytest.fixture(scope="module")
def said() -> tuple[list[list[int]], list[list[int]]]:
    """200 held-out prompts, and what the bundled model says to them."""
    prompts = [ids[:48] for ids in held_out_prompts(SpeculativeConfig(prompts=200))]
    return prompts, greedy_on_the_bundled_family(prompts)[0]


@pytest.mark.parametrize("method", BUNDLED)
def test_the_bundled_family_on_held_out_prompts(said, method):
    prompts, expected = said
    got, core = greedy_on_the_bundled_family(prompts, **BUNDLED[method])
    assert got == expected
    assert core.scheduler.counters.accepted > 200
