"""Sampled tokens behind guesses that were drawn themselves: those of the target, through the whole engine.

A target of five tokens and three drafts of it. Thousands of samples are drawn by the engine under each method, shape
and set of parameters; the joint of their third to fifth tokens, the first that are guessed, is held against
enumeration, and every bug that is planted must be caught. What is returned beside tokens is held to a run that is told
them.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiny_model, write_byte_tokenizer
from equivalence.enumeration import fit, next_token
from equivalence.paths import combined, drive, engine
from safetensors.torch import load_file, save_file

from quire.engine.core import EngineCore
from quire.engine.llm import LLM
from quire.engine.messages import AddRequest
from quire.engine.sequence_state import SequenceState
from quire.engine.spec import verification
from quire.engine.spec.model import ModelProposer
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import TokenLogprob

V, EOS, PROMPT = 5, 4, (3, 0)
ALPHA = 1e-4
N = 128  # samples of one request
BEGUN = 2  # tokens that a sample may draw before anything is guessed for it: its first ones come with its prompt
LENGTH = BEGUN + 3  # tokens that are looked at
REQUESTS = 28
FEW = 12  # are enough to catch a planted bug

Tokens = tuple[int, ...]

SETTINGS: dict[str, dict[str, object]] = {
    "plain": {"ignore_eos": True},
    "filters": {"ignore_eos": True, "temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.02},
    "penalties and bias": {
        "ignore_eos": True,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.5,
        "logit_bias": {1: 1.5, 3: -1.0},
    },
    "bans and min_tokens": {"allowed_token_ids": (0, 1, 3, EOS), "bad_words": ((0, 0), (3, 1)), "min_tokens": 2},
    "stop ids": {"stop_token_ids": (2,), "temperature": 1.3},
}
METHODS = ("draft", "layers", "nested")
SHAPES = ("chain:3", "rsd-c:2,2", "rsd-s:3x3")
ALL = list(itertools.product(METHODS, SHAPES, SETTINGS))
# Every method in every shape, each set of parameters at least once; all triples are among the slow ones.
SOME = [
    (method, shape, list(SETTINGS)[(i + 2 * j) % len(SETTINGS)])
    for i, method in enumerate(METHODS)
    for j, shape in enumerate(SHAPES)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each method its speculative_model, and the target: with logits so near each other that all tokens happen."""

    def make(name: str, **changes: object) -> str:
        folder = make_tiny_model(
            tmp_path_factory.mktemp("five") / name, vocab_size=V, bos_token_id=3, eos_token_id=EOS, **changes
        )
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] *= 0.15
        save_file(weights, folder / "model.safetensors")
        write_byte_tokenizer(folder)
        return str(folder)

    draft = make("draft", num_hidden_layers=2, hidden_size=32)
    return {"target": make("target"), "draft": draft, "layers": "0", "nested": "h/2"}


def params(setting: str) -> SamplingParams:
    return SamplingParams(max_tokens=7, **SETTINGS[setting])


def start(models: dict[str, str], method: str, shape: str, **settings: object) -> EngineCore:
    usual = {"max_num_seqs": N, "max_num_batched_tokens": 2048, "check": False, "speculative_adaptive": False}
    return engine(
        Path(models["target"]),
        speculative_method=method,
        speculative_model=models[method],
        speculative_tree=shape,
        **usual | settings,
    )


def asked(p: SamplingParams, count: int) -> list[AddRequest]:
    return [AddRequest(f"{i}", list(PROMPT), replace(p, seed=i, n=N)) for i in range(count)]


@pytest.fixture(scope="module")
def target(models) -> Callable[[Tokens], list[float]]:
    """The target's logits behind the prompt and some tokens, as an engine without guesses computes them."""
    core, heard = engine(Path(models["target"]), prefix_caching=False), []
    logits_at = core.runner.decoder.logits_at
    core.runner.decoder.logits_at = lambda *given: heard.append(logits_at(*given)) or heard[-1]
    known: dict[Tokens, list[float]] = {}

    def logits(drawn: Tokens) -> list[float]:
        if drawn not in known:
            drive(core, [[AddRequest("a", [*PROMPT, *drawn], SamplingParams(max_tokens=1, temperature=0.0))]])
            known[drawn] = heard.pop()[0].tolist()
        return known[drawn]

    return logits


def ends(p: SamplingParams, drawn: Tokens) -> bool:
    stops = {*p.stop_token_ids, *(() if p.ignore_eos else (EOS,))}
    return len(drawn) >= max(p.min_tokens, 1) and drawn[-1] in stops


def enumerated(
    target: Callable[[Tokens], list[float]], p: SamplingParams, drawn: Tokens = (), chance: float = 1.0
) -> Iterator[tuple[Tokens, float]]:
    """The first LENGTH tokens that a sample may have, or all until it ends, and how likely they are."""
    if len(drawn) == LENGTH or ends(p, drawn):
        yield drawn, chance
        return
    for token, likely in enumerate(next_token(target(drawn), p, PROMPT, drawn, (EOS,))):
        if likely:
            yield from enumerated(target, p, (*drawn, token), chance * likely)


def p_value(target: Callable[[Tokens], list[float]], p: SamplingParams, samples: list[Tokens]) -> float:
    """Of the hypothesis that the samples are the target's; 0 for what cannot be one."""
    chances: Counter[Tokens] = Counter()
    possible = set()
    for drawn, chance in enumerated(target, p):
        chances[drawn[BEGUN:]] += chance
        possible.add(drawn)
    if not {drawn[:LENGTH] for drawn in samples} <= possible:
        return 0.0
    seen = Counter(drawn[BEGUN:LENGTH] for drawn in samples)
    return fit(np.array([seen[cell] for cell in chances]), np.array(list(chances.values())))


def p_value_of_pairs(target: Callable[[Tokens], list[float]], p: SamplingParams, samples: list[Tokens]) -> float:
    """Of the hypothesis that samples of one request know nothing of each other: guessed tokens, two by two."""
    chances = np.zeros(V)
    for drawn, chance in enumerated(target, p):
        chances[drawn[BEGUN]] += chance
    pairs = Counter((a[BEGUN], b[BEGUN]) for a, b in zip(samples[::2], samples[1::2], strict=True))
    seen = np.array([pairs[cell] for cell in itertools.product(range(V), repeat=2)])
    return fit(seen, np.outer(chances, chances).ravel())


def samples_of(core: EngineCore, p: SamplingParams, count: int = REQUESTS) -> list[Tokens]:
    """Drawn in N samples of each of `count` requests, each to where it had to end."""
    samples = []
    for _, (tokens, reason) in sorted(drive(core, [asked(p, count)]).items()):
        assert reason == ("stop" if ends(p, tuple(tokens)) else "length")
        assert len(tokens) == p.max_tokens or reason == "stop"
        samples.append(tuple(tokens))
    assert len(samples) == count * N
    assert core.scheduler.counters.accepted > count * N // 20
    assert core.scheduler.counters.draft_failures == 0
    return samples


class TestTheJointIsTheTargets:
    @pytest.mark.parametrize(("method", "shape", "setting"), SOME)
    def test_of_all_samples(self, models, target, method, shape, setting):
        p = params(setting)
        assert p_value(target, p, samples_of(start(models, method, shape), p)) > ALPHA

    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "shape", "setting"), [one for one in ALL if one not in SOME])
    def test_of_all_samples_in_every_combination(self, models, target, method, shape, setting):
        p = params(setting)
        assert p_value(target, p, samples_of(start(models, method, shape), p)) > ALPHA

    @pytest.mark.parametrize("method", ["draft", "layers"])
    def test_where_rounds_are_cut_short_and_samples_preempted(self, models, target, monkeypatch, method):
        """Out of blocks and of tokens, with depths that differ from stream to stream and step to step."""
        scarce = {"num_blocks": 24, "block_size": 4, "max_num_seqs": 16, "max_model_len": 16}
        scarce["max_num_batched_tokens"] = 40
        core, rng = start(models, method, "rsd-s:3x3", **scarce), random.Random(3)
        monkeypatch.setattr(
            core.scheduler.drafting.speculation,
            "choose",
            lambda wishes, shape, tokens, seconds: [
                rng.randint(0, wish.most.shape.depth) if i < tokens // 9 else 0 for i, wish in enumerate(wishes)
            ],
        )
        p = params("penalties and bias")
        samples = samples_of(core, p, FEW)
        assert core.scheduler.counters.preemptions > 0
        assert p_value(target, p, samples) > ALPHA

    def test_behind_paths_that_were_moved(self, models, target):
        samples = samples_of(start(models, "draft", "rsd-c:4"), params("plain"))
        assert p_value(target, params("plain"), samples) > ALPHA

    def test_of_pairs_of_samples(self, models, target):
        samples = samples_of(start(models, "draft", "chain:3"), params("plain"))
        assert p_value_of_pairs(target, params("plain"), samples) > ALPHA


class TestPlantedBugsAreCaught:
    def test_a_q_that_guesses_were_not_drawn_from(self, models, target, monkeypatch):
        right = ModelProposer.propose

        def flatter(self, views):
            drafts, taken = right(self, views)
            roots = [draft.q.sqrt() for draft in drafts]
            drafts = [d._replace(q=q / q.sum(-1, keepdim=True)) for d, q in zip(drafts, roots, strict=True)]
            return drafts, taken

        monkeypatch.setattr(ModelProposer, "propose", flatter)
        assert p_value(target, params("plain"), samples_of(start(models, "draft", "chain:3"), params("plain"))) < ALPHA

    @pytest.mark.parametrize("setting", ["penalties and bias", "bans and min_tokens"])
    def test_edits_that_ignore_the_path(self, models, target, monkeypatch, setting):
        monkeypatch.setattr(verification._Case, "paths", lambda self: [()] * self.rows)
        core, p = start(models, "layers", "rsd-s:3x3"), params(setting)
        samples = [tuple(tokens) for tokens, _ in drive(core, [asked(p, FEW)]).values()]
        assert p_value(target, p, samples) < ALPHA

    def test_tokens_that_penalties_are_not_told_of(self, models, target, monkeypatch):
        monkeypatch.setattr(SequenceState, "append", lambda self, token: None)
        p = params("penalties and bias")
        assert p_value(target, p, samples_of(start(models, "nested", "chain:3"), p, FEW)) < ALPHA

    def test_an_accepted_path_that_is_left_where_it_was(self, models, target):
        core = start(models, "draft", "rsd-c:4")
        core.runner.compact = lambda layer, source, target: None
        assert p_value(target, params("plain"), samples_of(core, params("plain"))) < ALPHA

    def test_samples_that_share_their_noise(self, models, target, monkeypatch):
        add = SequenceState.__init__
        monkeypatch.setattr(
            SequenceState, "__init__", lambda self, p, sample, *rest: add(self, p, sample - sample % 2, *rest)
        )
        samples = samples_of(start(models, "draft", "chain:3"), params("plain"), FEW)
        assert p_value_of_pairs(target, params("plain"), samples) < ALPHA


# Of the same guesses.

SEEDED = SamplingParams(max_tokens=14, temperature=0.9, seed=11, ignore_eos=True, presence_penalty=0.4, n=3)
MOTIF = [7, 31, 8, 90, 14]


def big(method: str, tiny_model: Path, shape: str, **settings: object) -> EngineCore:
    """With room for everybody's guesses in every step."""
    model = {"draft": str(tiny_model), "layers": "0,1", "nested": "h/2"}[method]
    guesses = {"speculative_method": method, "speculative_model": model, "speculative_tree": shape}
    return engine(tiny_model, speculative_adaptive=False, **guesses | settings)


SAME_GUESSES = ("no_cache", "tiny_blocks", "fair", "deadline", "overlap", "torch_kernels", "reference_kernels")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_where_the_guesses_are_the_same(tiny_model, method, shape):
    """Whoever else runs, whatever is cached and on whatever path, as long as each step has room for all guesses."""
    request = AddRequest("r", MOTIF * 3, SEEDED, tenant="t0")
    mates = [AddRequest(f"m{i}", MOTIF * (1 + i), replace(SEEDED, n=1, seed=i), tenant="t1") for i in range(4)]
    core = big(method, tiny_model, shape)
    alone = drive(core, [[request]])
    assert len({tuple(tokens) for tokens, _ in alone.values()}) == 3
    assert drive(core, [[request]]) == alone  # its prompt is cached now
    for name in SAME_GUESSES:
        core = big(method, tiny_model, shape, **{"max_num_batched_tokens": 512} | combined((name,)))
        got = drive(core, [mates[:2], [], [request], mates[2:]])
        assert core.scheduler.counters.accepted > 0
        assert {sample: got[sample] for sample in alone} == alone, name


def test_an_unlike_round_gives_other_tokens(tiny_model):
    """Which tokens a seed gives depends on how much is guessed: so none are promised where that depends on the load."""
    tokens = [drive(big("layers", tiny_model, f"chain:{n}"), [[AddRequest("r", MOTIF * 3, SEEDED)]]) for n in (1, 2, 3)]
    assert tokens[0] != tokens[1] != tokens[2]


@pytest.mark.parametrize(("method", "shape"), zip(METHODS, SHAPES, strict=True))
def test_logprobs_are_those_of_a_run_that_is_told_the_tokens(tiny_model, method, shape):
    prompt = MOTIF * 3
    core = big(method, tiny_model, shape)
    core.handle(AddRequest("r", prompt, replace(SEEDED, logprobs=2)))
    tokens: dict[int, list[int]] = {}
    given: dict[int, list[TokenLogprob]] = {}
    while core.has_work:
        for chunk in core.step():
            tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
            given.setdefault(chunk.index, []).extend(chunk.logprobs)
    assert core.scheduler.counters.accepted > 0
    plain = engine(tiny_model)
    for index, drawn in tokens.items():
        plain.handle(AddRequest("t", prompt + drawn, SamplingParams(max_tokens=0, prompt_logprobs=2)))
        told = [one for chunk in plain.step() for one in chunk.prompt_logprobs][len(prompt) - 1 :]
        assert [one.token_id for one in given[index]] == [one.token_id for one in told] == drawn
        assert [one.rank for one in given[index]] == [one.rank for one in told]
        for ours, theirs in zip(given[index], told, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [t for t, _ in ours.top] == [t for t, _ in theirs.top]
            assert [x for _, x in ours.top] == pytest.approx([x for _, x in theirs.top], abs=1e-4)


@pytest.mark.parametrize(("method", "shape"), zip(METHODS, SHAPES, strict=True))
def test_a_stop_string_within_accepted_tokens_ends_the_text_before_it(tiny_model, method, shape):
    model = {"draft": str(tiny_model), "layers": "0,1", "nested": "h/2"}[method]
    settings = {"speculative_method": method, "speculative_model": model, "speculative_tree": shape}
    with LLM(str(tiny_model), dtype="float32", threads=1, speculative_adaptive=False, **settings) as llm:
        p = SamplingParams(max_tokens=24, temperature=0.9, seed=4, ignore_eos=True, allowed_token_ids=tuple(b"abc"))
        (whole,) = llm.generate([MOTIF * 3], p)
        text = whole.outputs[0].text
        assert len(text) == 24
        for at in (3, 8, 13):
            stop = text[at : at + 3]
            (cut,) = llm.generate([MOTIF * 3], p, stop=[stop])
            assert (cut.outputs[0].text, cut.outputs[0].finish_reason) == (text[: text.index(stop)], "stop")
            assert cut.outputs[0].stop_reason == stop
