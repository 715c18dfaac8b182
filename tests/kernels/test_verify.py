"""Speculation loses nothing: the exact joint of three tokens by enumeration, with a planted bug beside every claim.

A table model gives p and q for every prefix of up to three tokens over V = 5; the joint has 125 cells. Drafts are drawn
as proposers draw them (chains, constant branching, stochastic beams) and verified; where a round ends early, the rest
of the three tokens is drawn from p directly.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from quire.kernels import implementations
from quire.kernels.reference import noise
from quire.kernels.reference import verify as module
from quire.kernels.reference.noise import Purpose
from quire.kernels.reference.verify import match

V, COUNT = 5, 30_000
verify = implementations("verify")["reference"].run
Draft = tuple[Tensor, Tensor]  # tokens [B, N], parents [B, N]


class Table:
    """p(. | prefix) for all prefixes of 0, 1, 2 and 3 tokens, as rows [156, V]; a prefix's children follow it."""

    def __init__(self, seed: int, sharpness: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.p = (torch.randn(1 + V + V**2 + V**3, V, generator=generator) * sharpness).softmax(-1)

    def joint(self) -> Tensor:
        """[V**3], of the first three tokens."""
        first, second, third = self.p[:1], self.p[1 : 1 + V], self.p[1 + V : 1 + V + V**2]
        return (first.view(V, 1, 1) * second.view(V, V, 1) * third.view(V, V, V)).flatten()


def child(prefix: Tensor, token: Tensor) -> Tensor:
    """The row of prefix + token."""
    return prefix * V + 1 + token


TARGET, DRAFT = Table(1), Table(2)


def prefixes(tokens: Tensor, parents: Tensor) -> Tensor:
    rows = torch.zeros_like(tokens)
    for j in range(1, tokens.shape[1]):
        parent = rows.gather(1, parents[:, j : j + 1].clamp(min=0)).squeeze(1)
        rows[:, j] = child(parent, tokens[:, j])
    return rows


def branching(*widths: int) -> Callable[[torch.Generator], Draft]:
    """RSD-C: at every node the widths[level] best of log q + Gumbel noise, best first."""

    def draft(generator: torch.Generator) -> Draft:
        tokens, parents = torch.zeros(COUNT, 1, dtype=torch.int64), torch.full((COUNT, 1), -1)
        level = [0]
        for width in widths:
            next_level = []
            for row in level:
                log_q = DRAFT.p[prefixes(tokens, parents)[:, row]].log()
                ids = (log_q + gumbel((COUNT, V), generator)).topk(width).indices
                next_level += range(tokens.shape[1], tokens.shape[1] + width)
                tokens = torch.cat([tokens, ids], dim=1)
                parents = torch.cat([parents, torch.full_like(ids, row)], dim=1)
            level = next_level
        return tokens, parents

    return draft


def beam(width: int, depth: int) -> Callable[[torch.Generator], Draft]:
    """RSD-S: stochastic beam search (Kool et al. 2019), so that each tree has a shape of its own."""

    def draft(generator: torch.Generator) -> Draft:
        tokens, parents = torch.zeros(COUNT, 1, dtype=torch.int64), torch.full((COUNT, 1), -1)
        level = torch.zeros(COUNT, 1, dtype=torch.int64)
        phi, score = torch.zeros(COUNT, 1), torch.zeros(COUNT, 1)
        for _ in range(depth):
            log_q = DRAFT.p[prefixes(tokens, parents).gather(1, level)].log()
            phi_y = phi[..., None] + log_q
            perturbed = phi_y + gumbel(phi_y.shape, generator)
            z = perturbed.amax(-1, keepdim=True)
            g = -torch.log((-score[..., None]).exp() - (-z).exp() + (-perturbed).exp())
            score, best = g.flatten(1).topk(width)
            phi = phi_y.flatten(1).gather(1, best)
            parents = torch.cat([parents, level.gather(1, best // V)], dim=1)
            level = torch.arange(tokens.shape[1], tokens.shape[1] + width).expand(COUNT, -1)
            tokens = torch.cat([tokens, best % V], dim=1)
        return tokens, parents

    return draft


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return -torch.empty(shape).exponential_(generator=generator).log()


def three_tokens(draft: Callable[[torch.Generator], Draft], seed: int = 0) -> Tensor:
    """The cell [B] of the joint that each of B speculative runs ends in."""
    generator = torch.Generator().manual_seed(seed)
    tokens, parents = draft(generator)
    rows = prefixes(tokens, parents)
    zeros = torch.zeros(COUNT, dtype=torch.int64)
    accepted, last = verify(
        TARGET.p[rows], DRAFT.p[rows], tokens, parents, torch.arange(COUNT) + seed * COUNT, zeros, zeros
    )
    prefix, length = zeros.clone(), zeros.clone()
    for j in range(tokens.shape[1]):
        prefix = torch.where(accepted[:, j], child(prefix, tokens[:, j]), prefix)
        length += accepted[:, j]
    prefix, length = child(prefix, last), length + 1
    while bool((short := length < 3).any()):
        token = TARGET.p[prefix[short]].multinomial(1, generator=generator).squeeze(1)
        prefix[short] = child(prefix[short], token)
        length[short] += 1
    while bool((long := length > 3).any()):
        prefix[long] = (prefix[long] - 1) // V
        length[long] -= 1
    return prefix - (1 + V + V**2)


def p_value(cells: Tensor) -> float:
    """Of the hypothesis that the cells were drawn from the target's joint; rare cells are pooled."""
    expected = TARGET.joint().double() * len(cells)
    seen = torch.bincount(cells, minlength=V**3).double()
    rare = expected < 10
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    return float(stats.chisquare(seen.numpy(), (expected / expected.sum() * seen.sum()).numpy()).pvalue)


DRAFTS = {
    "chain of 1": branching(1),
    "chain of 3": branching(1, 1, 1),
    "2 x 2": branching(2, 2),
    "3 x 1": branching(3, 1),
    "all children": branching(V),
    "beam 3 x 2": beam(3, 2),
    "beam 1 x 3": beam(1, 3),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_the_joint_is_the_targets(name):
    assert p_value(three_tokens(DRAFTS[name])) > 1e-4


class TestPlantedBugsAreCaught:
    def test_children_sorted_by_id(self):
        def resorted(generator):
            tokens, parents = branching(2)(generator)
            tokens[:, 1:] = tokens[:, 1:].sort(dim=1).values
            return tokens, parents

        assert p_value(three_tokens(resorted)) < 1e-4

    def test_the_most_likely_children_instead_of_drawn_ones(self):
        def top(generator):
            tokens, parents = branching(2)(generator)
            tokens[:, 1:] = DRAFT.p[0].topk(2).indices
            return tokens, parents

        assert p_value(three_tokens(top)) < 1e-4

    def test_siblings_judged_by_the_first_q(self, monkeypatch):
        right = module._after_rejection
        monkeypatch.setattr(module, "_after_rejection", lambda p, q, x: (right(p, q, x)[0], q))
        assert p_value(three_tokens(branching(3))) < 1e-4

    def test_residual_not_taken(self, monkeypatch):
        right = module._after_rejection
        monkeypatch.setattr(module, "_after_rejection", lambda p, q, x: (p, right(p, q, x)[1]))
        assert p_value(three_tokens(branching(1, 1))) < 1e-4

    def test_one_noise_for_accepting_and_for_drawing(self, monkeypatch):
        right = noise.gumbel
        monkeypatch.setattr(noise, "gumbel", lambda s, i, at, purpose, v: right(s, i, at, Purpose.ACCEPT, v))
        assert p_value(three_tokens(branching(1, 1))) < 1e-4


def test_a_chain_is_plain_rejection_sampling_draw_for_draw():
    """Leviathan et al. 2023, algorithm 1, written out with the same noise."""
    tokens, parents = branching(1, 1, 1)(torch.Generator().manual_seed(5))
    rows = prefixes(tokens, parents)
    n = 400
    zeros = torch.zeros(n, dtype=torch.int64)
    accepted, last = verify(
        TARGET.p[rows[:n]], DRAFT.p[rows[:n]], tokens[:n], parents[:n], torch.arange(n), zeros, zeros
    )
    for b in range(n):
        source, count, p = (torch.tensor([b]), zeros[:1]), 0, TARGET.p[rows[b, 0]]
        for x in tokens[b, 1:].tolist():
            q = DRAFT.p[rows[b, count]]
            if noise.uniform(*source, torch.tensor([count]), Purpose.ACCEPT, 1).item() * q[x] >= p[x]:
                p = (p - q).clamp(min=0)
                p = p / p.cumsum(0)[-1]
                break
            count += 1
            p = TARGET.p[rows[b, count]]
        g = noise.gumbel(*source, torch.tensor([count]), Purpose.BONUS, V)[0]
        assert accepted[b].tolist() == [False, *(j < count for j in range(3))]
        assert last[b].item() == (p.log() + g).argmax().item()


def test_a_tree_does_not_depend_on_its_company_or_padding():
    tokens, parents = (x[:40] for x in branching(2, 2)(torch.Generator().manual_seed(6)))
    rows, counting, zeros = prefixes(tokens, parents), torch.arange(40), torch.zeros(40, dtype=torch.int64)
    accepted, last = verify(TARGET.p[rows], DRAFT.p[rows], tokens, parents, counting, zeros, counting)

    def padded(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x, torch.full((*x.shape[:1], 2, *x.shape[2:]), fill, dtype=x.dtype)], dim=1)

    for b in range(40):
        one = slice(b, b + 1)
        alone, token = verify(
            padded(TARGET.p[rows[one]], torch.nan),
            padded(DRAFT.p[rows[one]], torch.nan),
            padded(tokens[one], 0),
            padded(parents[one], -1),
            counting[one],
            zeros[one],
            counting[one],
        )
        assert torch.equal(alone[:, :-2], accepted[one])
        assert not alone[:, -2:].any()
        assert torch.equal(token, last[one])


def test_a_greedy_target_takes_its_own_path():
    greedy = torch.nn.functional.one_hot(TARGET.p.argmax(-1), V).float()
    tokens, parents = (x[:200] for x in branching(3, 3)(torch.Generator().manual_seed(7)))
    rows, zeros = prefixes(tokens, parents), torch.zeros(200, dtype=torch.int64)
    accepted, last = verify(greedy[rows], DRAFT.p[rows], tokens, parents, torch.arange(200), zeros, zeros)
    best = TARGET.p[rows].argmax(-1)
    for b in range(200):
        path = match(best[b].tolist(), tokens[b, 1:].tolist(), (parents[b, 1:] - 1).tolist())
        assert [j - 1 for j in accepted[b].nonzero().flatten().tolist()] == path
        assert last[b] == best[b, path[-1] + 1 if path else 0]
    assert accepted.any(dim=1).float().mean() > 0.1


def test_a_perfect_draft_is_always_accepted():
    tokens, parents = branching(1, 1, 1)(torch.Generator().manual_seed(8))
    rows, zeros = prefixes(tokens, parents), torch.zeros(COUNT, dtype=torch.int64)
    accepted, _ = verify(DRAFT.p[rows], DRAFT.p[rows], tokens, parents, torch.arange(COUNT), zeros, zeros)
    assert accepted[:, 1:].all()


def test_a_residual_lost_to_rounding_falls_back_to_p():
    p = torch.tensor([[0.25, 0.75], [0.0, 1.0]])
    after, rest = module._after_rejection(p, p, torch.tensor([0, 1]))
    assert torch.equal(after, p)
    assert rest.tolist() == [[0.0, 1.0], [0.0, 0.0]]


class TestMatch:
    def run(self, seed: int, walk=match, drafted: bool = True) -> list[int]:
        """Six tokens of the target's own sampling over a repeating table, with or without guesses."""
        generator, out = torch.Generator().manual_seed(seed), []

        def draw(tokens: list[int]) -> int:
            x = TARGET.p[hash(tuple(tokens[-2:])) % 156].log()
            g = noise.gumbel(torch.tensor([seed]), torch.tensor([0]), torch.tensor([len(tokens)]), Purpose.SAMPLE, V)
            return int((x + g[0]).argmax())

        while len(out) < 6:
            tokens = torch.randint(V, (6,), generator=generator).tolist() if drafted else []
            parents = [-1, -1, 0, 1, 1, 2][: len(tokens)]
            paths = [[]]
            for token, parent in zip(tokens, parents, strict=True):
                paths.append([*paths[parent + 1], token])
            draws = [draw(out + path) for path in paths]
            path = walk(draws, tokens, parents)
            out += [*(tokens[node] for node in path), draws[path[-1] + 1 if path else 0]]
        return out[:6]

    def test_guesses_never_change_a_token(self):
        assert all(self.run(seed) == self.run(seed, drafted=False) for seed in range(60))

    def test_a_planted_bug_is_caught(self):
        def gullible(draws, tokens, parents):
            return match([tokens[0], *draws[1:]] if tokens else draws, tokens, parents)

        assert any(self.run(seed, gullible) != self.run(seed, drafted=False) for seed in range(60))

    def test_walks_the_branch_that_was_drawn(self):
        tokens, parents = [7, 8, 9, 7, 9], [-1, -1, 0, 1, 1]
        assert match([8, 0, 9, 0, 0, 5], tokens, parents) == [1, 4]
        assert match([8, 0, 3, 0, 0, 5], tokens, parents) == [1]
        assert match([6, 0, 0, 0, 0, 0], tokens, parents) == []
        assert match([4], [], []) == []
