"""Verification loses nothing: exact joints by enumeration under every sampling parameter, with planted bugs.

A table gives the target's and the draft's logits behind every run of up to two tokens over V = 5. Thousands of
sequences that differ in their seed alone get a draft each, all are judged in one call, and runs that end early go on by
plain sampling until three tokens are there: 125 cells. What they should hold is computed by a naive reading of the
parameters, in Python. Guesses are drawn with the noise that proposers use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from equivalence.enumeration import fit, next_token
from torch import Tensor

from quire.engine.sampler import Sampler
from quire.engine.sequence_state import SequenceState
from quire.engine.spec import verification
from quire.engine.spec.proposer import Draft, DraftTree
from quire.engine.spec.verification import judge
from quire.kernels import Target, resolve
from quire.kernels.reference import noise
from quire.kernels.reference import verify as reference
from quire.kernels.reference.noise import Purpose
from quire.scheduler.params import SamplingParams

V, EOS, PROMPT = 5, 4, (1, 2)
COUNT = 20_000  # sequences
FEW = 8_000  # are enough to catch a planted bug
TARGET = Target("cpu", torch.float32, 64, "fp32")
TUNED = resolve(TARGET)
REFERENCE = resolve(TARGET, {"verify": "reference"})

# Logits behind a prefix: row 0 of none, row 1 + a of (a), row 1 + V + a * V + b of (a, b).
ROWS = 1 + V + V * V
TABLE, GUESSES = (torch.randn(ROWS, V, generator=torch.Generator().manual_seed(seed)) * 1.2 for seed in (1, 2))

SETTINGS = {
    "plain": {},
    "temperature and top-k": {"temperature": 0.7, "top_k": 3},
    "penalties and top-p": {
        "temperature": 1.3,
        "top_p": 0.85,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.5,
    },
    "bias, bad words, min-p": {"logit_bias": {1: 1.5, 3: -1.0}, "bad_words": ((2, 0), (3, 1), (4, 4)), "min_p": 0.15},
    "allowed ids and min_tokens": {"allowed_token_ids": (0, 1, 3, EOS), "min_tokens": 2},
}


def row_of(drawn: Sequence[int]) -> int:
    row = 0
    for token in drawn:
        row = row * V + 1 + token
    return row


def naive(table: Tensor, p: SamplingParams, drawn: tuple[int, ...]) -> list[float]:
    return next_token(table[row_of(drawn)].tolist(), p, PROMPT, drawn, (EOS,))


def joint(p: SamplingParams) -> np.ndarray:
    """[V ** 3] of three tokens."""

    def chance(cell: tuple[int, ...]) -> float:
        return math.prod(naive(TABLE, p, cell[:i])[token] for i, token in enumerate(cell))

    return np.array([chance(cell) for cell in product(range(V), repeat=3)])


def setting(name: str) -> SamplingParams:
    return SamplingParams(max_tokens=9, **SETTINGS[name])


def crowd(p: SamplingParams, count: int, kernels=TUNED) -> Sampler:
    """A sampler full of sequences that differ in their seed."""
    sampler = Sampler(kernels, V, count, (EOS,), "cpu")
    for slot in range(count):
        sampler.add(slot, dataclasses.replace(p, seed=slot * 7919 + 3), 0, PROMPT, len(PROMPT))
    return sampler


# Drawers: the guesses of one sequence. q[row of a prefix] is a distribution over V, g[depth][row of the tree] the noise
# of the children of that row. They give the tree's tokens and parents, and the prefix behind every row of it.
Noise = np.ndarray  # [depths, 1 + nodes, V]
Drawn = tuple[list[int], list[int], list[tuple[int, ...]]]
Drawer = Callable[[np.ndarray, Noise], Drawn]


def branching(*widths: int) -> Drawer:
    """RSD-C: at every node the widths[level] best of log q + noise, best first. A chain is all ones."""

    def draw(q: np.ndarray, g: Noise) -> Drawn:
        tokens, parents, prefixes, level = [], [], [()], [0]
        for depth, width in enumerate(widths):
            below = []
            for row in level:
                perturbed = np.log(q[row_of(prefixes[row])]) + g[depth, row]
                for t in np.argsort(-perturbed)[:width].tolist():
                    if perturbed[t] > -np.inf:
                        tokens.append(t)
                        parents.append(row - 1)
                        prefixes.append((*prefixes[row], t))
                        below.append(len(tokens))
            level = below
        return tokens, parents, prefixes

    return draw


def beam(width: int, depth: int) -> Drawer:
    """RSD-S: stochastic beam search (Kool et al. 2019, section 4.1)."""

    def draw(q: np.ndarray, g: Noise) -> Drawn:
        tokens, parents, prefixes = [], [], [()]
        level = [(0, 0.0, 0.0)]  # row, phi, G
        for at in range(depth):
            found = []
            for row, phi, score in level:
                phis = phi + np.log(q[row_of(prefixes[row])])
                perturbed = phis + g[at, row]
                scores = -np.log(np.exp(-score) - np.exp(-perturbed.max()) + np.exp(-perturbed))
                found += [(scores[t], row, t, phis[t]) for t in range(V) if phis[t] > -np.inf]
            level = []
            for score, row, t, phi in sorted(found, reverse=True)[:width]:
                tokens.append(t)
                parents.append(row - 1)
                prefixes.append((*prefixes[row], t))
                level.append((len(tokens), phi, score))
        return tokens, parents, prefixes

    return draw


def by_id(drawer: Drawer) -> Drawer:
    """The planted bug: siblings in the order of their ids. Of trees of one level."""

    def draw(q: np.ndarray, g: Noise) -> Drawn:
        tokens, parents, _ = drawer(q, g)
        return sorted(tokens), parents, [(), *((t,) for t in sorted(tokens))]

    return draw


DRAWERS = {"chain": branching(1, 1), "rsd-c": branching(2, 2), "rsd-s": beam(3, 2)}


def tables(sampler: Sampler, logits: Tensor) -> Tensor:
    """What sequence 0 would be drawn from behind every prefix: [ROWS, V]."""
    prefixes = [cell for length in range(3) for cell in product(range(V), repeat=length)]
    states = sampler.states([0] * ROWS)
    return sampler.distributions(sampler.edited(logits, states, prefixes), states)


def drafts_by(sampler: Sampler, drawer: Drawer, q: Tensor, count: int) -> tuple[list[Draft], list[int]]:
    """A draft for each of `count` sequences, and of all their rows the rows of the tables."""
    states = sampler.states(range(count))
    seeds = torch.tensor([state.seed for state in states])
    rows = 1 + 6  # the largest tree here has six nodes
    g = [
        noise.gumbel(
            seeds, torch.zeros_like(seeds), torch.full_like(seeds, len(PROMPT) + depth), Purpose.DRAFT, rows * V
        )
        for depth in range(2)
    ]
    perturbations = torch.stack(g, dim=1).view(count, 2, rows, V).numpy().astype(np.float64)
    trees, places = [], []
    with np.errstate(divide="ignore"):
        for b in range(count):
            tokens, parents, prefixes = drawer(q.numpy(), perturbations[b])
            trees.append(DraftTree(tuple(tokens), tuple(parents)))
            places += [row_of(prefix) for prefix in prefixes]
    parts = q[torch.tensor(places)].split([1 + len(tree.tokens) for tree in trees])
    return [Draft(tree, part) for tree, part in zip(trees, parts, strict=True)], places


def three_tokens(sampler: Sampler, drafts: Sequence[Draft], places: Sequence[int]) -> np.ndarray:
    """The cell of the joint that each sequence ends in, [sequences]."""
    count = len(drafts)
    verdicts = judge(sampler, TABLE[torch.tensor(places)], range(count), [len(PROMPT)] * count, drafts)
    drawn = [verdict.result.token_ids for verdict in verdicts]
    while short := [b for b in range(count) if len(drawn[b]) < 3]:
        logits = TABLE[torch.tensor([row_of(drawn[b]) for b in short])]
        results = sampler.sample(logits, short, [len(PROMPT) + len(drawn[b]) for b in short])
        for b, result in zip(short, results, strict=True):
            drawn[b] += result.token_ids
    return np.array([(a * V + b) * V + c for a, b, c, *_ in drawn])


def p_value(cells: np.ndarray, p: SamplingParams) -> float:
    """Of the hypothesis that the cells were drawn from the target's joint."""
    return fit(np.bincount(cells, minlength=V**3), joint(p))


def drawn_drafts(name: str, drawer: Drawer, count: int = COUNT, kernels=TUNED) -> float:
    sampler = crowd(setting(name), count, kernels)
    drafts, places = drafts_by(sampler, drawer, tables(sampler, GUESSES), count)
    return p_value(three_tokens(sampler, drafts, places), setting(name))


def point_masses(name: str, count: int = COUNT) -> float:
    """All sequences get one tree, a function of the past: two likely guesses, and two behind each."""
    sampler = crowd(setting(name), count)
    best = GUESSES.topk(2).indices.tolist()
    first = best[0]
    tokens = (*first, *best[row_of(first[:1])], *best[row_of(first[1:])])
    tree = DraftTree(tokens, (-1, -1, 0, 0, 1, 1))
    places = [row_of(tree.path(node)) for node in range(-1, len(tokens))]
    return p_value(three_tokens(sampler, [Draft(tree)] * count, places * count), setting(name))


@pytest.mark.parametrize("name", SETTINGS)
def test_distributions_are_the_naive_ones(name):
    sampler = crowd(setting(name), 1)
    for logits in (TABLE, GUESSES):
        found = tables(sampler, logits)
        for length in range(3):
            for prefix in product(range(V), repeat=length):
                right = torch.tensor(naive(logits, setting(name), prefix))
                torch.testing.assert_close(found[row_of(prefix)], right, atol=1e-6, rtol=1e-5)


ALL = [(name, shape) for name in SETTINGS for shape in DRAWERS]
# Every setting and every shape; all pairs of them are among the slow ones.
SOME = [
    ("plain", "chain"),
    ("plain", "rsd-c"),
    ("plain", "rsd-s"),
    ("temperature and top-k", "rsd-s"),
    ("penalties and top-p", "chain"),
    ("bias, bad words, min-p", "rsd-c"),
    ("allowed ids and min_tokens", "chain"),
]


class TestTheJointIsTheTargets:
    @pytest.mark.parametrize(("name", "shape"), SOME)
    def test_guesses_drawn_from_q(self, name, shape):
        assert drawn_drafts(name, DRAWERS[shape]) > 1e-4

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "shape"), [pair for pair in ALL if pair not in SOME])
    def test_guesses_drawn_from_q_in_every_shape(self, name, shape):
        assert drawn_drafts(name, DRAWERS[shape]) > 1e-4

    @pytest.mark.parametrize("name", SETTINGS)
    def test_point_masses(self, name):
        assert point_masses(name) > 1e-4


class TestPlantedBugsAreCaught:
    @pytest.mark.parametrize("name", list(SETTINGS)[2:])
    def test_edits_that_ignore_the_path(self, monkeypatch, name):
        monkeypatch.setattr(verification._Case, "paths", lambda self: [()] * self.rows)
        assert drawn_drafts(name, DRAWERS["chain"], FEW) < 1e-4

    def test_edits_of_point_masses_that_ignore_the_path(self, monkeypatch):
        monkeypatch.setattr(verification._Case, "paths", lambda self: [()] * self.rows)
        assert point_masses("penalties and top-p", FEW) < 1e-4

    def test_siblings_sorted_by_id(self):
        assert drawn_drafts("plain", by_id(branching(2)), FEW) < 1e-4

    def test_the_q_of_another_temperature(self):
        p = setting("temperature and top-k")
        sampler = crowd(p, FEW)
        drafts, places = drafts_by(sampler, DRAWERS["chain"], tables(sampler, GUESSES), FEW)
        hotter = (GUESSES[torch.tensor(places)] / 2).softmax(-1).split([3] * FEW)
        wrong = [Draft(draft.tree, q) for draft, q in zip(drafts, hotter, strict=True)]
        assert p_value(three_tokens(sampler, wrong, places), p) < 1e-4

    def test_the_q_of_the_row_below(self):
        p = setting("temperature and top-k")
        sampler = crowd(p, FEW)
        drafts, places = drafts_by(sampler, DRAWERS["rsd-c"], tables(sampler, GUESSES), FEW)
        wrong = [Draft(draft.tree, draft.q.roll(-1, dims=0)) for draft in drafts]
        assert p_value(three_tokens(sampler, wrong, places), p) < 1e-4

    @pytest.mark.parametrize("purpose", ["ACCEPT", "BONUS"])
    def test_noise_of_the_guesses(self, monkeypatch, purpose):
        right = getattr(noise, {"ACCEPT": "uniform", "BONUS": "gumbel"}[purpose])

        def shared(seeds, sample_index, positions, _, columns):
            return right(seeds, sample_index, positions, Purpose.DRAFT, columns)

        p = setting("plain")
        sampler = crowd(p, COUNT, REFERENCE)
        drafts, places = drafts_by(sampler, DRAWERS["rsd-c"], tables(sampler, GUESSES), COUNT)
        monkeypatch.setattr(noise, right.__name__, shared)
        assert p_value(three_tokens(sampler, drafts, places), p) < 1e-4

    def test_residual_of_the_first_q(self, monkeypatch):
        right = reference._after_rejection
        monkeypatch.setattr(reference, "_after_rejection", lambda p, q, x: (right(p, q, x)[0], q))
        assert drawn_drafts("plain", branching(3), FEW, REFERENCE) < 1e-4

    def test_one_position_for_all_draws(self, monkeypatch):
        right = Sampler.choose

        def choose(self, logits, states, paths, positions):
            return right(self, logits, states, paths, [positions[0]] * len(positions))

        monkeypatch.setattr(Sampler, "choose", choose)
        assert point_masses("plain", FEW) < 1e-4

    def test_a_state_that_is_not_told(self, monkeypatch):
        monkeypatch.setattr(SequenceState, "append", lambda self, token: None)
        assert drawn_drafts("penalties and top-p", DRAWERS["chain"], FEW) < 1e-4
