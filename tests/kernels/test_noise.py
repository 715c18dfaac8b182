"""Counter-based noise: the published Philox vectors, the distributions' shape, and independence of the company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from quire.kernels.reference import noise
from quire.kernels.reference.noise import Purpose

# Random123's own known-answer tests for philox4x32, 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORDS = {"tensor": torch.tensor, "array": lambda word: np.array([word], np.uint64), "int": int}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_words(kind, counter, key, result):
    word = WORDS[kind]
    words = noise.philox4x32(tuple(map(word, counter)), tuple(map(word, key)))
    assert tuple(int(np.array(w).item()) for w in words) == result


def test_mix_is_the_finaliser_of_splitmix64():
    # The generator's first output for seed 0 is the finaliser of its increment.
    assert noise.mix(ints(0x9E3779B97F4A7C15 - 2**64)).item() % 2**64 == 0xE220A8397B1DCDAF


def test_columns_lie_four_to_a_counter():
    group = noise.philox4x32((ints(2), ints(7), ints(3), ints(int(Purpose.DRAFT))), noise.philox_key(ints(11)))
    row = noise.words(ints(11), ints(3), ints(7), Purpose.DRAFT, 12)[0, 8:]
    assert row.tolist() == [int(word) for word in group]


@pytest.mark.parametrize("width", [1, 3, 4, 5, 64, 1001])
def test_chosen_columns_are_those_of_the_whole_row(width):
    seeds, index, positions = ints(1, -1, 2**63 - 1), ints(0, 1, 2), ints(0, 5, 100_000)
    whole = noise.words(seeds, index, positions, Purpose.SAMPLE, width)
    columns = torch.randint(width, (3, 7), generator=torch.Generator().manual_seed(0))
    assert whole.shape == (3, width)
    assert torch.equal(noise.words(seeds, index, positions, Purpose.SAMPLE, columns), whole.gather(1, columns))


def test_a_row_does_not_depend_on_its_company():
    seeds, index, positions = ints(*range(5)), ints(4, 3, 2, 1, 0), ints(9, 9, 8, 8, 7)
    together = noise.gumbel(seeds, index, positions, Purpose.SAMPLE, 70_001)
    for row in range(5):
        one = slice(row, row + 1)
        alone = noise.gumbel(seeds[one], index[one], positions[one], Purpose.SAMPLE, 70_001)
        assert torch.equal(together[one], alone)


def test_every_part_of_the_source_changes_the_noise():
    def row(seed=5, index=0, position=1, purpose=Purpose.SAMPLE):
        return tuple(noise.words(ints(seed), ints(index), ints(position), purpose, 8)[0].tolist())

    rows = {
        row(),
        row(seed=6),
        row(seed=5 + 2**32),
        row(seed=5 - 2**63),
        row(index=1),
        row(position=2),
        *(row(purpose=purpose) for purpose in Purpose if purpose is not Purpose.SAMPLE),
    }
    assert len(rows) == 9
    assert len(set(row())) == 8


def test_uniforms_never_reach_their_ends():
    extremes = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1]).float()
    u = noise.to_uniform(extremes.clone())
    assert u.min() > 0
    assert u.max() < 1
    assert noise.to_gumbel(extremes.clone()).isfinite().all()


def test_the_winning_end_of_gumbel_noise_keeps_its_precision():
    """A token of probability 1e-8 is drawn as often as that: exp(-gumbel) near 0 is the exponential it must beat."""
    words = torch.arange(1000, dtype=torch.float32)
    exact = -np.log1p(-(np.arange(1000) + 0.5) / 2**32)
    np.testing.assert_allclose(np.exp(-noise.to_gumbel(words).double().numpy()), exact, rtol=1e-5)


@pytest.mark.parametrize("axis", ["columns", "positions", "seeds"])
def test_distributions(axis):
    n = 40_000
    counting, zeros = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    sources = {
        "columns": (ints(3), ints(0), ints(0), Purpose.SAMPLE, n),
        "positions": (zeros, zeros, counting, Purpose.SAMPLE, 1),
        "seeds": (counting, zeros, zeros, Purpose.SAMPLE, 1),
    }
    u = noise.uniform(*sources[axis]).flatten().double().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    assert stats.kstest(noise.gumbel(*sources[axis]).flatten().double().numpy(), "gumbel_r").pvalue > 1e-4
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / n**0.5
    # The test's power: a uniform bent by 2 % is told apart.
    assert stats.kstest(u**1.02 * 0.98, "uniform").pvalue < 1e-4
