"""Trees that grow from tables: their distributions by enumeration, each with a planted bug that must be caught."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from quire.engine.sampler import Sampler
from quire.engine.sequence_state import SequenceState
from quire.engine.spec import children as children_module
from quire.engine.spec import tree as tree_module
from quire.engine.spec.children import Parent, choose_children
from quire.engine.spec.proposer import DraftTree
from quire.engine.spec.tree import Growth, truncated
from quire.kernels import Target, resolve
from quire.scheduler.drafts import parse_shape
from quire.scheduler.params import SamplingParams

ALPHA = 1e-4
COUNT = 8_000
START = 0  # the last real token


def table(seed: int, vocab: int, sharpness: float = 1.5) -> Tensor:
    """Logits [V, V] of a model whose next token depends on the last one alone: row t is what follows token t."""
    return torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)) * sharpness


def make_sampler(vocab: int) -> Sampler:
    return Sampler(resolve(Target("cpu", torch.float32, 16, "fp32")), vocab, 1, (), "cpu")


def make_state(vocab: int, sample_index: int, **params: object) -> SequenceState:
    values = SamplingParams(**({"max_tokens": 64, "temperature": 1.0} | params))  # type: ignore[arg-type]
    return SequenceState(values, sample_index, [START], 1, (), vocab)


def grow(
    logits: Tensor, shape: str, count: int = 1, ends: Collection[int] = (), **params: object
) -> tuple[list[DraftTree], list[dict[int, Tensor | None]]]:
    """`count` trees of sequences that differ in their sample index, and what each node's children were drawn from."""
    vocab = logits.shape[1]
    sampler, drawn = make_sampler(vocab), params.get("temperature", 1.0) != 0
    growths = [Growth(parse_shape(shape, 4), bool(drawn), ends) for _ in range(count)]
    states = [make_state(vocab, i, **params) for i in range(count)]
    q: list[dict[int, Tensor | None]] = [{} for _ in growths]
    while any(growth.frontier for growth in growths):
        owners = [i for i, growth in enumerate(growths) for _ in growth.frontier]
        nodes = [node for growth in growths for node in growth.frontier]
        parents = [
            Parent(states[i], node, growths[i].path(node), 1 + growths[i].depth(node))
            for i, node in zip(owners, nodes, strict=True)
        ]
        last = [growths[i].tokens[node] if node >= 0 else START for i, node in zip(owners, nodes, strict=True)]
        width = max(growth.width for growth in growths if growth.frontier)
        found = choose_children(sampler, logits[last], parents, width)
        for i, node, own in zip(owners, nodes, found.q, strict=True):
            q[i][node] = own
        rows = iter(found.best)
        for growth in growths:
            if growth.frontier:
                growth.extend([next(rows) for _ in growth.frontier])
    return [growth.tree for growth in growths], q


def p_value(seen: Sequence[int], expected: Sequence[float]) -> float:
    """Chi-square of counts against probabilities; cells that expect fewer than five are taken together."""
    counts, shares = np.asarray(seen, np.float64), np.asarray(expected, np.float64)
    assert math.isclose(shares.sum(), 1.0, rel_tol=1e-4)
    shares = shares / shares.sum() * counts.sum()
    rare = shares < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        shares = np.append(shares[~rare], shares[rare].sum())
        if shares[-1] < 5:
            counts, shares = np.append(counts[:-2], counts[-2:].sum()), np.append(shares[:-2], shares[-2:].sum())
    return float(stats.chisquare(counts, shares).pvalue)


def frequencies(keys: Sequence[tuple[int, ...]], joint: dict[tuple[int, ...], float]) -> float:
    """The p-value of what was seen against the joint."""
    seen = Counter(keys)
    assert seen.keys() <= joint.keys()
    return p_value([seen[key] for key in joint], list(joint.values()))


# Constant branching.


def ordered_pairs(p: Tensor) -> dict[tuple[int, ...], float]:
    """Two draws without replacement."""
    p = p.double()
    return {
        (a, b): (p[a] * p[b] / (1 - p[a])).item()
        for a, b in itertools.permutations(range(len(p)), 2)
        if p[a] * p[b] > 0
    }


SETTINGS = [{}, {"temperature": 0.7}, {"top_k": 3}, {"logit_bias": {1: 2.0}}, {"allowed_token_ids": (0, 2, 4)}]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", ["rsd-c:2", "rsd-s:2x1"])
def test_siblings_are_drawn_without_replacement(shape: str, params: dict[str, object]) -> None:
    logits = table(1, 5)
    trees, q = grow(logits, shape, COUNT, **params)
    assert q[0][-1] is not None
    assert frequencies([tree.tokens for tree in trees], ordered_pairs(q[0][-1])) > ALPHA


def test_siblings_in_another_order_are_caught() -> None:
    trees, q = grow(table(1, 5), "rsd-c:2", COUNT)
    assert q[0][-1] is not None
    assert frequencies([tuple(sorted(tree.tokens)) for tree in trees], ordered_pairs(q[0][-1])) < ALPHA


def cousins() -> float:
    """Whether the first children of two siblings are drawn independently."""
    p = (logits := table(1, 4)).softmax(-1)
    trees, _ = grow(logits, "rsd-c:2,1", COUNT)
    pairs = [(tree.tokens[2], tree.tokens[3]) for tree in trees if tree.tokens[:2] == (1, 2)]
    joint = {(a, b): (p[1, a] * p[2, b]).item() for a, b in itertools.product(range(4), repeat=2)}
    return frequencies(pairs, joint)


def test_cousins_are_independent() -> None:
    assert cousins() > ALPHA


def test_noise_that_ignores_the_node_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = children_module._sources
    monkeypatch.setattr(
        children_module, "_sources", lambda parents, device: right([p._replace(node=0) for p in parents], device)
    )
    assert cousins() < ALPHA


# Stochastic beams.


def beams() -> float:
    """The sequences at the end of a beam of two, in its order, are two draws without replacement of whole sequences."""
    p = (logits := table(3, 3)).softmax(-1).double()
    sequences = list(itertools.product(range(3), repeat=2))
    chance = {(a, b): (p[START, a] * p[a, b]).item() for a, b in sequences}
    joint = {(*s, *t): chance[s] * chance[t] / (1 - chance[s]) for s, t in itertools.permutations(sequences, 2)}
    trees, _ = grow(logits, "rsd-s:2x2", COUNT)
    return frequencies([tree.path(len(tree.tokens) - 2) + tree.path(len(tree.tokens) - 1) for tree in trees], joint)


def test_a_beam_draws_sequences_without_replacement() -> None:
    assert beams() > ALPHA


def test_a_beam_that_is_not_bound_by_its_parents_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "truncated", lambda value, largest, bound: value)
    assert beams() < ALPHA


def test_truncation_is_its_formula() -> None:
    for value, largest, bound in [(0.3, 1.2, -0.5), (-4.0, 0.1, 2.5), (1.0, 1.001, 0.0), (-9.0, 3.0, 3.1)]:
        plain = -math.log(math.exp(-bound) - math.exp(-largest) + math.exp(-value))
        assert truncated(value, largest, bound) == pytest.approx(plain, rel=1e-9)
    assert truncated(2.0, 2.0, 0.7) == 0.7
    assert truncated(-1000.0, -2.0, 5.0) == pytest.approx(-1000.0, abs=1e-6)  # the plain formula overflows
    assert truncated(-900.0, -899.0, -1200.0) == -1200.0  # so does this one


def test_a_parent_s_best_child_inherits_its_rank() -> None:
    growth = Growth(parse_shape("rsd-s:3x2", 4), drawn=True)
    growth.extend([tree_module.Best((4, 2, 1), (-1.0, -2.0, -3.0), (0.5, 0.1, -0.2))])
    ranks = growth._rank[1:]
    growth.extend([tree_module.Best((0, 1), (-0.5, -1.0), (2.0, -60.0))] * 3)
    assert growth._rank[4:] == pytest.approx(ranks)
    assert growth.parents[3:] == [0, 1, 2]


# Chains, and what is the same whatever the shape.


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_a_tree_without_siblings_is_a_chain(params: dict[str, object]) -> None:
    logits = table(5, 12)
    drawn = [grow(logits, shape, 200, **params)[0] for shape in ("chain:3", "rsd-c:1,1,1", "rsd-s:1x3")]
    assert drawn[0] == drawn[1] == drawn[2]
    assert all(tree.parents == (-1, 0, 1) for tree in drawn[0])


def chains() -> float:
    p = (logits := table(6, 4)).softmax(-1)
    joint = {(a, b): (p[START, a] * p[a, b]).item() for a, b in itertools.product(range(4), repeat=2)}
    return frequencies([tree.tokens for tree in grow(logits, "chain:2", COUNT)[0]], joint)


def test_a_chain_is_drawn_from_the_model() -> None:
    assert chains() > ALPHA


def test_noise_that_ignores_the_position_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = children_module._sources
    monkeypatch.setattr(
        children_module,
        "_sources",
        lambda parents, device: right([p._replace(position=1, node=-1) for p in parents], device),
    )
    assert chains() < ALPHA


def greedy_beam(logits: Tensor, width: int, depth: int) -> list[tuple[int, ...]]:
    log_p = logits.log_softmax(-1)
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(depth):
        beam = sorted(
            (
                (score + log_p[(START, *path)[-1], y].item(), (*path, y))
                for score, path in beam
                for y in range(len(log_p))
            ),
            reverse=True,
        )[:width]
    return [path for _, path in beam]


def test_greedy_trees_hold_the_likeliest_and_have_no_q() -> None:
    logits = table(7, 9)
    (tree,), (q,) = grow(logits, "rsd-c:3,2", temperature=0.0)
    assert tree.tokens[:3] == tuple(logits[START].topk(3).indices.tolist())
    for i in range(3):
        assert tree.tokens[3 + 2 * i : 5 + 2 * i] == tuple(logits[tree.tokens[i]].topk(2).indices.tolist())
    assert tree.parents == (-1, -1, -1, 0, 0, 1, 1, 2, 2)
    assert all(own is None for own in q.values())
    (beam,), _ = grow(logits, "rsd-s:3x3", temperature=0.0)
    assert [beam.path(node) for node in range(6, 9)] == greedy_beam(logits, 3, 3)
    (chain,), _ = grow(logits, "chain:3", temperature=0.0)
    assert chain.tokens == greedy_beam(logits, 1, 3)[0]


@pytest.mark.parametrize("shape", ["rsd-c:3,3", "rsd-s:3x2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_cannot_be_drawn_is_not_guessed(shape: str, temperature: float) -> None:
    logits = table(8, 6)
    trees, _ = grow(logits, shape, 50, temperature=temperature, allowed_token_ids=(2, 5))
    assert all(set(tree.tokens) <= {2, 5} for tree in trees)
    assert all(sum(parent < 0 for parent in tree.parents) == 2 for tree in trees)
    # Behind 2 no token is left: a leaf, and no error.
    trees, _ = grow(logits, shape, 20, temperature=temperature, allowed_token_ids=(2, 5), bad_words=((2, 2), (2, 5)))
    assert all(tree.tokens[parent] != 2 for tree in trees for parent in tree.parents if parent >= 0)


@pytest.mark.parametrize("shape", ["chain:4", "rsd-c:2,2,1", "rsd-s:2x3"])
def test_nothing_follows_an_end(shape: str) -> None:
    logits = table(9, 4)
    trees, _ = grow(logits, shape, 100, ends={1})
    ends = [(tree, node) for tree in trees for node, token in enumerate(tree.tokens) if token == 1]
    assert len(ends) > 20
    assert all(node not in tree.parents for tree, node in ends)


def test_penalties_see_the_path() -> None:
    """A token that may not come twice does not, though the model wants nothing else."""
    logits = torch.zeros(5, 5)
    logits[:, 3] = 20.0
    (tree,), _ = grow(logits, "chain:3", temperature=0.0, presence_penalty=2.0, logit_bias={3: -19.0})
    assert tree.tokens[0] == 3
    assert 3 not in tree.tokens[1:]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(broken: float, temperature: float) -> None:
    logits = table(1, 5)
    logits[START, 2] = broken
    with pytest.raises(ValueError, match="no numbers"):
        grow(logits, "chain:2", temperature=temperature)
