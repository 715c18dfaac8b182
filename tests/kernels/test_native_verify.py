"""The compiled verification walks the reference's path, on every instruction set, whatever shares the call."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quire.kernels.cpu.native import library
from quire.kernels.testing import pair

pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))

TREES = 14
Tree = tuple[Tensor, Tensor, Tensor, Tensor]


def random_trees(nodes: int, vocab: int) -> Tree:
    """p, q, tokens, parents: q like p, siblings drawn from q without replacement, rows that only pad NaN."""
    generator = torch.Generator().manual_seed(nodes * vocab)

    def upto(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    p = (torch.randn(TREES, nodes, vocab, generator=generator) * 2).softmax(-1)
    q = (torch.randn(TREES, nodes, vocab, generator=generator) + 0.6 * p.log()).softmax(-1)
    p[::2] = p[::2].masked_fill(p[::2] < p[::2].mean(-1, keepdim=True) * 0.3, 0.0)
    p /= p.sum(-1, keepdim=True)
    tokens, parents = torch.zeros(TREES, nodes, dtype=torch.int64), torch.full((TREES, nodes), -1)
    for tree in range(TREES):
        rest, size = q[tree].clone(), 1 + upto(nodes)
        for row in range(1, size):
            parent = row - 1 - upto(min(row, 3))
            if rest[parent].sum() > 0:
                tokens[tree, row] = rest[parent].multinomial(1, generator=generator)
                rest[parent, tokens[tree, row]] = 0.0
                parents[tree, row] = parent
        p[tree, size:], q[tree, size:] = math.nan, math.nan
    return p, q, tokens, parents


def sources(count: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.arange(count)
    return numbers * 0x9E3779B97F4A7C15 - 7, numbers % 3, numbers * 100_003


def assert_same(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])


@pytest.mark.usefixtures("level")
class TestLevels:
    # Below and above a vector of 16, a group of 64 and a piece of 256.
    @pytest.mark.parametrize(("nodes", "vocab"), [(2, 33), (5, 5), (9, 300), (6, 5000), (33, 64), (1, 17)])
    def test_walks_the_references_path(self, nodes: int, vocab: int) -> None:
        trees, (ours, oracle) = random_trees(nodes, vocab), pair("verify", "native")
        right = oracle.run(*trees, *sources(TREES))
        assert_same(ours.run(*trees, *sources(TREES)), right)
        if nodes > 1:
            assert 0 < right[0].sum() < (trees[3] == 0).sum()  # some are taken, some are not

    def test_bonus_noise_is_the_references(self) -> None:
        """Where all tokens are as likely, the noise alone decides."""
        p = torch.full((300, 1, 131), 1 / 131)
        tree = (torch.zeros(300, 1, dtype=torch.int64), torch.full((300, 1), -1))
        ours, oracle = pair("verify", "native")
        assert_same(ours.run(p, p, *tree, *sources(300)), oracle.run(p, p, *tree, *sources(300)))


def test_many_siblings_at_one_node() -> None:
    """A column of noise for each, up to all that a tree can have."""
    ours, oracle = pair("verify", "native")
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.rand(40, 64, 80, generator=generator).pow(4) for _ in range(2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    p[:, 0, :79] *= 1e-3  # the last is nearly always right, and drawn late
    p /= p.sum(-1, keepdim=True)
    q[:, 0, 79] = 1e-9
    tokens = torch.zeros(40, 64, dtype=torch.int64)
    for tree in range(40):
        tokens[tree, 1:] = q[tree, 0].multinomial(63, generator=generator)
    parents = torch.tensor([-1] + [0] * 63).expand(40, -1)
    right = oracle.run(p, q, tokens, parents, *sources(40))
    assert right[0].nonzero()[:, 1].max() > 1
    assert_same(ours.run(p, q, tokens, parents, *sources(40)), right)


def test_a_tree_feels_neither_company_nor_threads(two_threads: None) -> None:
    trees, ours = random_trees(9, 5000), pair("verify", "native")[0]
    together = ours.run(*trees, *sources(TREES))
    for tree in range(TREES):
        one = slice(tree, tree + 1)
        alone = ours.run(*(x[one] for x in trees), *(x[one] for x in sources(TREES)))
        assert_same(alone, (together[0][one], together[1][one]))


def test_a_residual_lost_to_rounding_falls_back_to_p() -> None:
    p = torch.tensor([0.0, 0.5, 0.5, 0.0]).expand(20, 3, 4).contiguous()
    tokens, parents = torch.tensor([[0, 0, 3]]).repeat(20, 1), torch.tensor([[-1, 0, 0]]).repeat(20, 1)
    ours, oracle = pair("verify", "native")
    found = ours.run(p, p, tokens, parents, *sources(20))
    assert_same(found, oracle.run(p, p, tokens, parents, *sources(20)))
    assert set(found[1].tolist()) == {1, 2}


def test_an_unsound_row_is_where_its_walk_ends() -> None:
    """Its children are rejected, whatever token follows is one of the vocabulary, and other trees do not notice."""
    p, q, tokens, parents = random_trees(6, 40)
    ours = pair("verify", "native")[0]
    clean = ours.run(p, q, tokens, parents, *sources(TREES))
    p[3, 0] = math.nan
    accepted, last = ours.run(p, q, tokens, parents, *sources(TREES))
    assert not accepted[3].any()
    assert 0 <= last[3] < 40
    others = torch.arange(TREES) != 3
    assert_same((accepted[others], last[others]), (clean[0][others], clean[1][others]))


def test_what_does_not_belong_together_is_refused() -> None:
    p, q, tokens, parents = random_trees(3, 40)
    ours = pair("verify", "native")[0]
    with pytest.raises(ValueError, match="do not belong together"):
        ours.run(p, q[:, :2], tokens, parents, *sources(TREES))
    tokens[:, 1], parents[:, 1] = 40, 0
    with pytest.raises(IndexError, match="outside of the vocabulary"):
        ours.run(p, q, tokens, parents, *sources(TREES))


def test_a_planted_bug_is_caught() -> None:
    """Verified against another draft than the one it was drawn from, a tree walks elsewhere."""
    p, q, tokens, parents = random_trees(9, 300)
    ours, oracle = pair("verify", "native")
    wrong = ours.run(p, q.roll(1, dims=-1), tokens, parents, *sources(TREES))
    right = oracle.run(p, q, tokens, parents, *sources(TREES))
    assert not (torch.equal(wrong[0], right[0]) and torch.equal(wrong[1], right[1]))
