"""Children of drafted nodes: the reference by enumeration, the other draws by the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from quire.kernels import implementations
from quire.kernels.cpu.native import library
from quire.kernels.reference import noise
from quire.kernels.reference.noise import Purpose
from quire.kernels.testing import challengers, device_of, pair

reference = implementations("draw_children")["reference"].run
native = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))
others = pytest.mark.parametrize("name", sorted({name for name, _ in challengers("draw_children")}))

# Around a vector of 16, a group of 64, and a stretch of columns that begins inside of one.
WIDTHS = (1, 7, 16, 33, 64, 65, 100, 1000, 4096, 5003)


def sources(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers = torch.arange(rows)
    return numbers * 0x9E3779B97F4A7C15 - 7, numbers % 3, numbers * 100_003, numbers % 11


def distributions(rows: int, vocab: int) -> Tensor:
    q = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).softmax(-1)
    q[1::3] = q[1::3].masked_fill(q[1::3] < q[1::3].mean(-1, keepdim=True), 0.0)
    return q / q.sum(-1, keepdim=True)


# The reference.


@pytest.mark.parametrize("node", [0, 5])
def test_pairs_are_drawn_without_replacement(node: int) -> None:
    count, q = 30_000, torch.tensor([0.45, 0.3, 0.0, 0.2, 0.05])
    zeros = torch.zeros(count, dtype=torch.int64)
    tokens, keys = reference(q.repeat(count, 1), 2, zeros, torch.arange(count), zeros + 9, zeros + node)
    assert (keys[:, 0] > keys[:, 1]).all()

    def p_value(pairs: Tensor) -> float:
        cells = list(itertools.permutations((0, 1, 3, 4), 2))
        seen = [int((pairs == torch.tensor(cell)).all(1).sum()) for cell in cells]
        assert sum(seen) == count
        expected = torch.stack([q[a] * q[b] / (1 - q[a]) for a, b in cells]).double()
        return float(stats.chisquare(seen, (expected / expected.sum() * count).numpy()).pvalue)

    assert p_value(tokens) > 1e-4
    assert p_value(tokens.sort(dim=1).values) < 1e-4  # siblings in another order


def test_a_node_s_noise_is_its_own_stretch_of_columns() -> None:
    q = distributions(6, 10)
    where = sources(6)
    _, keys = reference(q, 10, *where)
    seeds, samples, positions, nodes = where
    for row in range(6):
        wide = noise.gumbel(*(x[row : row + 1] for x in (seeds, samples, positions)), Purpose.DRAFT, 120)[0]
        own = wide[nodes[row] * 10 : nodes[row] * 10 + 10] + q[row].log()
        torch.testing.assert_close(own.sort(descending=True).values, keys[row])


# The others.


def run(name: str, *args: Tensor | int) -> tuple[Tensor, Tensor]:
    """Of the named implementation, back on the CPU."""
    placed = [arg.to(device_of(name)) if isinstance(arg, Tensor) else arg for arg in args]
    tokens, keys = pair("draw_children", name)[0].run(*placed)
    return tokens.cpu(), keys.cpu()


def assert_same(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    drawn = right[1] > -math.inf
    assert torch.equal(found[1] > -math.inf, drawn)
    assert torch.equal(found[0][drawn], right[0][drawn])
    torch.testing.assert_close(found[1][drawn], right[1][drawn], atol=2e-6, rtol=2e-6)


@others
@pytest.mark.parametrize("vocab", WIDTHS)
def test_draws_are_the_references(name: str, vocab: int) -> None:
    q = distributions(13, vocab)
    for count in {1, min(3, vocab), min(20, vocab)}:
        assert_same(run(name, q, count, *sources(13)), reference(q, count, *sources(13)))


@native
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("vocab", WIDTHS)
def test_every_instruction_set_draws_alike(vocab: int) -> None:
    q = distributions(13, vocab)
    assert_same(run("native", q, min(3, vocab), *sources(13)), reference(q, min(3, vocab), *sources(13)))


@others
def test_where_less_can_be_drawn_keys_say_so(name: str) -> None:
    q = torch.zeros(3, 70)
    q[0, 69], q[2, 3], q[2, 66] = 1.0, 0.5, 0.5
    q[1] = math.nan
    for tokens, keys in (reference(q, 4, *sources(3)), run(name, q, 4, *sources(3))):
        assert (keys > -math.inf).sum(1).tolist() == [1, 0, 2]
        assert tokens[0, 0] == 69
        assert set(tokens[2, :2].tolist()) == {3, 66}
        assert ((tokens >= 0) & (tokens < 70)).all()


@others
def test_a_row_feels_neither_company_nor_threads(name: str, two_threads: None) -> None:
    q = distributions(9, 5003)
    together = run(name, q, 4, *sources(9))
    for row in range(9):
        alone = run(name, q[row : row + 1], 4, *(x[row : row + 1] for x in sources(9)))
        assert torch.equal(alone[0][0], together[0][row])
        assert torch.equal(alone[1][0], together[1][row])


@others
def test_rows_may_be_strided_and_there_may_be_none(name: str) -> None:
    q = distributions(5, 1003)
    assert_same(run(name, q[:, 1:-1][::2], 2, *sources(3)), reference(q[:, 1:-1][::2], 2, *sources(3)))
    assert [len(columns) for columns in run(name, q[:0], 2, *sources(0))] == [0, 0]


@others
def test_noise_of_another_node_is_caught(name: str) -> None:
    q = distributions(13, 1000)
    seeds, samples, positions, nodes = sources(13)
    with pytest.raises(AssertionError):
        assert_same(run(name, q, 3, seeds, samples, positions, nodes + 1), reference(q, 3, *sources(13)))


@others
@pytest.mark.parametrize("count", [0, 71])
def test_a_count_that_cannot_be_is_refused(name: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} of 70 tokens"):
        run(name, distributions(2, 70), count, *sources(2))
