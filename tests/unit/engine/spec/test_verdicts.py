"""What becomes of each draft: the very tokens of a run without guesses, no batch-mates felt, faults kept to themselves.

Sequences with any parameters over logits that are a function of all tokens before. The joints that verification keeps
are in test_verification.py.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from quire.engine.sampler import NAN_LOGITS, NO_TOKEN_LEFT, Sampler
from quire.engine.sequence_state import SequenceState
from quire.engine.spec.proposer import Draft, DraftTree
from quire.engine.spec.verification import Verdict, judge
from quire.kernels import Target, resolve
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import RowResult, TokenLogprob

V, EOS = 12, 11
TUNED = resolve(Target("cpu", torch.float32, 64, "fp32"))


def logits_behind(tokens: Sequence[int]) -> Tensor:
    """[V]; halves, so that ties happen."""
    generator = torch.Generator().manual_seed(zlib.crc32(bytes(tokens)))
    return (torch.randn(V, generator=generator) * 6).round() / 2


def any_params(random: Random, **given: object) -> SamplingParams:
    """A draw of every parameter; what edits and what filters is off half of the time."""

    def sometimes(value: object, otherwise: object) -> object:
        return random.choice([value, otherwise])

    chosen = {
        "temperature": random.choice([0.0, 0.7, 1.0, 3.0]),
        "top_k": sometimes(random.randint(1, V), 0),
        "top_p": sometimes(0.7, 1.0),
        "min_p": sometimes(0.1, 0.0),
        "presence_penalty": sometimes(0.8, 0.0),
        "frequency_penalty": sometimes(0.6, 0.0),
        "repetition_penalty": sometimes(1.4, 1.0),
        "min_tokens": sometimes(4, 0),
        "logit_bias": sometimes({3: 2.0, 5: -4.0}, {}),
        "allowed_token_ids": random.choice([None, None, (0, 2, 3, 5, 7, 8, EOS)]),
        "bad_words": sometimes(((3,), (2, 5), (7, 8, 2)), ()),
        "logprobs": random.choice([None, 0, 2, -1]),
        "seed": random.getrandbits(63),
    }
    return SamplingParams(max_tokens=50, **chosen | given)


@dataclasses.dataclass
class Run:
    """One sequence: what it asks for, and what it has got."""

    params: SamplingParams
    prompt: list[int]
    drawn: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.drawn

    def take(self, result: RowResult) -> None:
        assert result.error is None
        self.drawn += result.token_ids
        self.logprobs += result.logprobs or []

    def fresh(self) -> Run:
        return Run(self.params, self.prompt)


def sampler_of(runs: Sequence[Run], kernels=TUNED) -> Sampler:
    sampler = Sampler(kernels, V, len(runs), (EOS,), "cpu")
    for slot, run in enumerate(runs):
        sampler.add(slot, run.params, slot, run.tokens, len(run.prompt))
    return sampler


def plainly(runs: Sequence[Run], count: int) -> list[Run]:
    """The same sequences, `count` tokens each, without guesses."""
    runs = [run.fresh() for run in runs]
    sampler = sampler_of(runs)
    for _ in range(count):
        logits = torch.stack([logits_behind(run.tokens) for run in runs])
        results = sampler.sample(logits, range(len(runs)), [len(run.tokens) for run in runs])
        for run, result in zip(runs, results, strict=True):
            run.take(result)
    return runs


def logits_of(run: Run, tree: DraftTree) -> Tensor:
    """[1 + nodes, V]"""
    return torch.stack([logits_behind([*run.tokens, *tree.path(node)]) for node in range(-1, len(tree.tokens))])


def half_right(random: Random, future: Sequence[int]) -> DraftTree:
    """A tree of up to six nodes that often holds a beginning of the future, siblings being distinct."""
    tokens: list[int] = []
    parents: list[int] = []
    for _ in range(random.randint(0, 6)):
        parent = random.choice([-1, len(tokens) - 1])
        depth = len(DraftTree(tuple(tokens), tuple(parents)).path(parent))
        right = future[depth] if depth < len(future) else 0
        token = right if random.random() < 0.7 else random.randrange(V)
        if (token, parent) not in zip(tokens, parents, strict=True):
            tokens.append(token)
            parents.append(parent)
    return DraftTree(tuple(tokens), tuple(parents))


LENGTH = 10


def guided(runs: Sequence[Run], future: Sequence[Run], random: Random) -> tuple[list[Run], int]:
    """The runs with drafts of the kind `match` until LENGTH tokens are there, and how many guesses were accepted."""
    runs = [run.fresh() for run in runs]
    sampler, accepted = sampler_of(runs), 0
    while going := [slot for slot, run in enumerate(runs) if len(run.drawn) < LENGTH]:
        trees = [half_right(random, future[slot].drawn[len(runs[slot].drawn) :]) for slot in going]
        logits = torch.cat([logits_of(runs[slot], tree) for slot, tree in zip(going, trees, strict=True)])
        positions = [len(runs[slot].tokens) for slot in going]
        for slot, tree, verdict in zip(
            going, trees, judge(sampler, logits, going, positions, [Draft(tree) for tree in trees]), strict=True
        ):
            assert [tree.tokens[node] for node in verdict.path] == verdict.result.token_ids[:-1]
            assert verdict.result.drafted == len(tree.tokens)
            assert verdict.result.draft_depth == max([0, *tree.depths()])
            runs[slot].take(verdict.result)
            accepted += len(verdict.path)
    return runs, accepted


def any_runs(count: int, **given: object) -> list[Run]:
    random = Random(count)
    return [Run(any_params(random, **given), random.choices(range(V), k=random.randint(1, 5))) for _ in range(count)]


class TestMatchGivesTheVeryTokens:
    def test_with_every_parameter(self):
        """Tokens and log-probabilities are those of a run without guesses, at any temperature."""
        runs = any_runs(60)
        future = plainly(runs, LENGTH + 7)
        found, accepted = guided(runs, future, Random(1))
        assert accepted > 150
        for run, right in zip(found, future, strict=True):
            assert run.drawn == right.drawn[: len(run.drawn)]
            assert run.logprobs == right.logprobs[: len(run.logprobs)]
            assert (run.params.logprobs is None) == (run.logprobs == [])

    @pytest.mark.parametrize("bug", ["path", "position", "state"])
    def test_a_planted_bug_is_caught(self, monkeypatch, bug):
        runs = any_runs(60)
        future = plainly(runs, LENGTH + 7)
        right = Sampler.choose

        def choose(self, logits, states, paths, positions):
            if bug == "path":
                paths = [()] * len(paths)
            if bug == "position":
                positions = [positions[0]] * len(positions)
            return right(self, logits, states, paths, positions)

        monkeypatch.setattr(Sampler, "choose", choose)
        if bug == "state":
            monkeypatch.setattr(SequenceState, "append", lambda self, token: None)
        found, _ = guided(runs, future, Random(1))
        assert any(run.drawn != right.drawn[: len(run.drawn)] for run, right in zip(found, future, strict=True))


def chain_of(tokens: Sequence[int]) -> DraftTree:
    return DraftTree(tuple(tokens), tuple(range(-1, len(tokens) - 1)))


def any_drafts(runs: Sequence[Run]) -> list[Draft]:
    """Trees that hold each run's next tokens, with a q where the run is sampled and its number is even."""
    random, drafts = Random(2), []
    for i, (run, future) in enumerate(zip(runs, plainly(runs, 4), strict=True)):
        tree = half_right(random, future.drawn)
        q = torch.rand(1 + len(tree.tokens), V, generator=torch.Generator().manual_seed(i)).softmax(-1)
        drafts.append(Draft(tree, q if run.params.temperature > 0 and i % 2 == 0 else None))
    return drafts


def judged(runs: Sequence[Run], drafts: Sequence[Draft], logits: Sequence[Tensor], kernels=TUNED) -> list[Verdict]:
    return judge(
        sampler_of(runs, kernels), torch.cat(list(logits)), range(len(runs)), [len(r.tokens) for r in runs], drafts
    )


class TestOneCallForAll:
    RUNS = tuple(any_runs(40))
    DRAFTS = tuple(any_drafts(RUNS))
    LOGITS = tuple(logits_of(run, draft.tree) for run, draft in zip(RUNS, DRAFTS, strict=True))

    def test_nobody_feels_the_others(self):
        """Rules, shapes, temperatures and parameters side by side: every verdict is that of a call of its own."""
        together = judged(self.RUNS, self.DRAFTS, self.LOGITS)
        assert {verdict.result.drafted for verdict in together} >= {0, 3, 5}
        for i, verdict in enumerate(together):
            sampler = sampler_of(self.RUNS)
            alone = judge(sampler, self.LOGITS[i], [i], [len(self.RUNS[i].tokens)], [self.DRAFTS[i]])
            assert alone == [verdict]

    def test_nothing_is_left_behind_in_the_logits(self):
        before = [logits.clone() for logits in self.LOGITS]
        logits = torch.cat(self.LOGITS)
        positions = [len(run.tokens) for run in self.RUNS]
        judge(sampler_of(self.RUNS), logits, range(len(self.RUNS)), positions, self.DRAFTS)
        assert torch.equal(logits, torch.cat(before))

    def test_logprobs_are_of_the_rows_that_tokens_were_drawn_from(self):
        for run, logits, draft, (result, path) in zip(
            self.RUNS, self.LOGITS, self.DRAFTS, judged(self.RUNS, self.DRAFTS, self.LOGITS), strict=True
        ):
            if run.params.logprobs is None:
                assert result.logprobs is None
                continue
            rows = [0, *(node + 1 for node in path)]
            right = sampler_of([run]).logprobs(logits[rows], result.token_ids, (run.params.logprobs, ()))
            assert result.logprobs == right
            assert [found.token_id for found in result.logprobs] == result.token_ids
            assert result.token_ids[:-1] == [draft.tree.tokens[node] for node in path]


class TestFaults:
    """Chains of three that are accepted whole where nothing is at fault; all three sequences sample."""

    RUNS = tuple(
        Run(SamplingParams(max_tokens=9, temperature=0.7, presence_penalty=0.5, logprobs=1, seed=seed), [seed])
        for seed in (1, 2, 3)
    )
    TREES = tuple(DraftTree((*run.drawn, (run.drawn[0] + 1) % V), (-1, 0, 1, -1)) for run in plainly(RUNS, 3))

    def judged(self, poison: dict[int, float] | None = None, rule: str = "match") -> list[Verdict]:
        """poison: row of the second sequence -> what one of its logits becomes."""
        logits = [logits_of(run, tree) for run, tree in zip(self.RUNS, self.TREES, strict=True)]
        drafts = [Draft(tree) for tree in self.TREES]
        if rule == "verify":
            # By itself a guess is accepted: q is all but zero there.
            drafts = [Draft(tree, torch.full((5, V), 1e-6)) for tree in self.TREES]
        for row, value in (poison or {}).items():
            logits[1][row, 4] = value
        return judged(self.RUNS, drafts, logits)

    @pytest.mark.parametrize("rule", ["match", "verify"])
    def test_none(self, rule):
        for verdict, tree in zip(self.judged(rule=rule), self.TREES, strict=True):
            assert verdict.path == [0, 1, 2]
            assert verdict.result.token_ids[:3] == list(tree.tokens[:3])

    @pytest.mark.parametrize("rule", ["match", "verify"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("row", [0, 2, 3])
    def test_a_row_on_the_path_ends_it_there(self, rule, value, row):
        """The first one ends its sequence; behind guesses these are kept, and the last of them is the step's token."""
        clean, found = self.judged(rule=rule), self.judged({row: value}, rule)
        right = clean[1].result
        assert found[1].result.error == (NAN_LOGITS if row == 0 else None)
        assert found[1].result.token_ids == right.token_ids[:row] == list(self.TREES[1].tokens[:row])
        assert (found[1].result.logprobs or []) == right.logprobs[:row]
        assert (found[1].result.drafted, found[1].result.draft_depth) == (right.drafted, right.draft_depth)
        assert row == 0 or found[1].path == list(range(row - 1))
        assert [found[0], found[2]] == [clean[0], clean[2]]

    @pytest.mark.parametrize("rule", ["match", "verify"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_row_off_the_path_ends_nobody(self, rule, value):
        assert self.judged({4: value}, rule) == self.judged(rule=rule)

    @pytest.mark.parametrize("rule", ["match", "verify"])
    def test_no_token_left(self, rule):
        """After 3 comes 5 or nothing, and 5 is a bad word behind 3: that is found out when 3 is the last token."""
        p = SamplingParams(max_tokens=9, temperature=1.0, allowed_token_ids=(3, 5), bad_words=((3, 5), (3, 3), (7, 3)))
        for first, prompt, tokens, error in ((3, 0, [3], None), (5, 7, [5, 5], None), (3, 3, [], NO_TOKEN_LEFT)):
            run, tree = Run(p, [prompt]), DraftTree((3, 5, 5), (-1, -1, 1))
            logits = torch.zeros(4, V)
            logits[:, first] = 50.0
            q = torch.full((4, V), 1e-6) if rule == "verify" else None
            (verdict,) = judged([run], [Draft(tree, q)], [logits])
            assert verdict.result.error == error
            assert verdict.result.token_ids[: len(tokens)] == tokens
            assert bool(verdict.result.token_ids) == (error is None)

    @pytest.mark.parametrize("rule", ["match", "verify"])
    @pytest.mark.parametrize("depth", [0, 2, 9])
    def test_edits_that_raise(self, monkeypatch, rule, depth):
        """Of the second sequence, behind paths of one length; nobody's path is as long as 9."""
        clean, right = self.judged(rule=rule), SequenceState.edits

        def edits(self, path=()):
            if self.sample_index == 1 and len(path) == depth:
                raise ZeroDivisionError
            return right(self, path)

        monkeypatch.setattr(SequenceState, "edits", edits)
        found = self.judged(rule=rule)
        assert [found[0], found[2]] == [clean[0], clean[2]]
        if depth == 0:
            assert "ZeroDivisionError" in found[1].result.error
            assert found[1].result.token_ids == []
        elif depth == 2:
            assert found[1].result.error is None
            assert found[1].result.token_ids == clean[1].result.token_ids[:2]
        else:
            assert found[1] == clean[1]

    def test_a_q_beside_temperature_0(self):
        run = Run(SamplingParams(max_tokens=9, temperature=0.0), [1])
        with pytest.raises(ValueError, match="temperature 0 has a q"):
            judged([run], [Draft(chain_of([1]), torch.ones(2, V) / V)], [torch.zeros(2, V)])

    def test_an_empty_slot_is_the_runners_mistake(self):
        with pytest.raises(KeyError):
            judge(Sampler(TUNED, V, 2, (), "cpu"), torch.zeros(1, V), [1], [1], [Draft(chain_of([]))])
