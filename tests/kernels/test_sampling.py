"""Every implementation of the sampling ops against definitions written out in plain Python, and against chi-square."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quire.kernels import implementations
from quire.kernels.reference import noise
from quire.kernels.reference.noise import Purpose
from quire.kernels.reference.sampling import Bias, LogitEdits, Marks, Masks, Penalties
from quire.kernels.testing import cases

INF = math.inf


# The interpreter takes a tenth of a second for a row, so tests of thousands of rows leave it out;
# test_triton_sampling.py holds those kernels against the reference.
INTERPRETED = "triton" if not torch.cuda.is_available() else ""


def each(op_name: str, leave_out: str = "") -> pytest.MarkDecorator:
    names = [name for name, _ in cases(op_name, [torch.float32]) if name != leave_out]
    return pytest.mark.parametrize("run", [implementations(op_name)[name].run for name in names], ids=names)


def columns(count: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> dict[str, torch.Tensor]:
    return {
        "temperature": torch.full((count,), float(temperature)),
        "top_k": torch.full((count,), top_k),
        "top_p": torch.full((count,), float(top_p)),
        "min_p": torch.full((count,), float(min_p)),
        "seeds": torch.full((count,), seed),
        "sample_index": torch.zeros(count, dtype=torch.int64),
        "positions": torch.arange(count),
    }


def draws(run, logits: list[float], count: int = 300, **params) -> set[int]:
    """The tokens seen in many draws from one row."""
    return set(run(torch.tensor(logits).repeat(count, 1), **columns(count, **params)).tolist())


def kept_by_definition(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The filters one token at a time, in float64."""
    top = max(logits)
    weight = [math.exp((x - top) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ranked = ranked[:top_k] if top_k > 0 else ranked
    if top_p < 1:
        total, mass, nucleus = sum(weight[i] for i in ranked), 0.0, []
        for i in ranked:
            if mass >= top_p * total and nucleus:
                break
            nucleus.append(i)
            mass += weight[i]
        ranked = nucleus
    return sorted(i for i in ranked if i == ranked[0] or weight[i] >= min_p * weight[ranked[0]])


@each("greedy")
def test_greedy_takes_the_lowest_id_of_equals_and_shows_unsound_rows(run):
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, math.nan, INF], [-INF] * 3, [0.0, INF, 1.0]])
    values, ids = run(logits)
    assert ids[:2].tolist() == [1, 0]
    assert values.isfinite().tolist() == [True, True, False, False, False]


@each("sample", leave_out=INTERPRETED)
class TestSample:
    def test_temperature_zero_is_the_argmax(self, run):
        logits = torch.randn(50, 33).round()
        assert torch.equal(run(logits, **columns(50, temperature=0, top_k=3)), logits.max(dim=-1).indices)

    @pytest.mark.parametrize("temperature", [1e-30, 1e-5, 1e30])
    def test_no_temperature_overflows(self, run, temperature):
        seen = draws(run, [1e30, -1e30, 5.0, -INF], temperature=temperature)
        assert seen == {0} if temperature < 1 else seen <= {0, 1, 2}

    def test_tokens_without_mass_are_never_drawn(self, run):
        assert draws(run, [0.0, -INF, 0.0, -INF]) == {0, 2}
        assert draws(run, [0.0, -INF, 0.0, -INF], top_k=3, top_p=0.999, min_p=1e-6) == {0, 2}

    def test_top_k_breaks_ties_by_id(self, run):
        assert draws(run, [1.0, 1.0, 1.0, 1.0], top_k=2) == {0, 1}
        assert draws(run, [0.0, 1.0, 1.0, 1.0], top_k=2) == {1, 2}
        assert draws(run, [0.0, 1.0], top_k=100) == {0, 1}

    def test_top_p_is_the_smallest_set_that_holds_the_mass(self, run):
        # Powers of two: every partial sum is exact.
        logits = [math.log(p) for p in (0.125, 0.5, 0.25, 0.125)]
        assert draws(run, logits, top_p=1e-6) == {1}
        assert draws(run, logits, top_p=0.4999) == {1}
        assert draws(run, logits, top_p=0.5001) == {1, 2}
        assert draws(run, logits, top_p=0.7501) == {0, 1, 2}
        assert draws(run, logits, top_p=0.8751) == {0, 1, 2, 3}
        assert draws(run, [0.0] * 4, top_p=0.5) == {0, 1}

    def test_top_p_counts_mass_after_top_k(self, run):
        logits = [math.log(p) for p in (0.4, 0.2, 0.2, 0.2)]
        assert draws(run, logits, top_p=0.65) == {0, 1, 2}
        assert draws(run, logits, top_p=0.65, top_k=2) == {0}

    def test_min_p_is_relative_to_the_most_likely(self, run):
        logits = [math.log(p) for p in (0.1, 0.6, 0.3)]
        assert draws(run, logits, min_p=0.4) == {1, 2}
        assert draws(run, logits, min_p=0.6) == {1}
        assert draws(run, [2.0, 2.0, 1.0], min_p=1.0) == {0, 1}

    @given(
        logits=st.lists(st.integers(-12, 12).map(lambda x: x / 4), min_size=1, max_size=40),
        temperature=st.sampled_from([0.3, 1.0, 2.5]),
        top_k=st.integers(0, 45),
        top_p=st.floats(0.0101, 1.0).map(lambda p: round(p, 3) + 0.00037 if p < 0.99 else 1.0),
        min_p=st.sampled_from([0.0, 0.0101, 0.2003, 0.703]),
        seed=st.integers(-(2**63), 2**63 - 1),
    )
    @settings(max_examples=100, deadline=None)
    def test_equals_its_definition(self, run, logits, temperature, top_k, top_p, min_p, seed):
        kept = kept_by_definition(logits, temperature, top_k, top_p, min_p)
        params = columns(3, temperature, top_k, top_p, min_p, seed)
        g = noise.gumbel(params["seeds"], params["sample_index"], params["positions"], Purpose.SAMPLE, len(logits))
        expected = [
            max(kept, key=lambda i: (logits[i] - max(logits)) / temperature + g[row, i].item()) for row in range(3)
        ]
        assert run(torch.tensor(logits).repeat(3, 1), **params).tolist() == expected

    @pytest.mark.parametrize(
        "params",
        [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 50, "top_p": 0.8, "min_p": 0.01}],
        ids=str,
    )
    @pytest.mark.parametrize("temperature", [0.7, 3.0])
    def test_equals_the_reference_on_a_wide_vocabulary_and_in_any_company(self, run, params, temperature):
        logits = torch.randn(3, 33_001, generator=torch.Generator().manual_seed(1)) * 4
        params = columns(3, temperature, **params)
        together = run(logits, **params)
        assert torch.equal(together, implementations("sample")["reference"].run(logits, **params))
        alone = [run(logits[i : i + 1], **{k: v[i : i + 1] for k, v in params.items()}) for i in range(3)]
        assert torch.equal(together, torch.cat(alone))

    @pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
    def test_a_row_that_nothing_can_be_drawn_from_gives_an_id(self, run, params):
        logits = torch.tensor([[-INF] * 3, [0.0, math.nan, 1.0], [INF, 0.0, 1.0], [-INF, math.nan, INF]])
        assert set(run(logits, **columns(4, **params)).tolist()) <= {0, 1, 2}

    def test_rows_keep_their_own_parameters(self, run):
        logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
        params = columns(4)
        params["temperature"] = torch.tensor([0.0, 1.0, 2.0, 1.0])
        params["top_k"] = torch.tensor([5, 0, 3, 1])
        params["top_p"] = torch.tensor([1.0, 1.0, 0.5, 1.0])
        together = run(logits, **params).tolist()
        alone = [run(logits[i : i + 1], **{k: v[i : i + 1] for k, v in params.items()}).item() for i in range(4)]
        assert together == alone
        assert together[3] == logits[3].argmax().item()


def chi_square(seen: torch.Tensor, p: torch.Tensor) -> float:
    p = (p / p.sum()).double()
    return stats.chisquare(seen[p > 0].numpy(), (p[p > 0] / p[p > 0].sum() * seen.sum()).numpy()).pvalue


@pytest.mark.parametrize("params", [{}, {"temperature": 1.7}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_draws_have_the_stated_distribution(params):
    """Of the reference; every other implementation draws the same tokens, as shown above."""
    run = implementations("sample")["reference"].run
    count, logits = 20_000, torch.randn(16, generator=torch.Generator().manual_seed(3))
    rows, columns_ = logits.repeat(count, 1), columns(count, seed=77, **params)
    names = ("temperature", "top_k", "top_p", "min_p")
    p = implementations("probabilities")["reference"].run(logits[None], **{n: columns_[n][:1] for n in names})[0]
    seen = torch.bincount(run(rows, **columns_), minlength=16)
    assert seen[p == 0].sum() == 0
    assert chi_square(seen, p) > 1e-4
    # The test's power: 4 points of mass moved from the most likely token to the others is caught.
    biased = p.clone()
    biased[p.argmax()] -= 0.04
    assert chi_square(seen, biased) < 1e-4


@each("probabilities")
def test_probabilities_are_what_the_filters_leave(run):
    logits = [0.0, 1.0, 2.0, 2.0, -1.0]
    for temperature, top_k, top_p, min_p in [
        (1.0, 0, 1.0, 0.0),
        (0.5, 3, 1.0, 0.0),
        (2.0, 4, 0.7, 0.1),
        (1.0, 0, 0.3, 0.0),
    ]:
        kept = kept_by_definition(logits, temperature, top_k, top_p, min_p)
        weight = [math.exp(x / temperature) if i in kept else 0.0 for i, x in enumerate(logits)]
        args = (torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
        expected = torch.tensor([w / sum(weight) for w in weight])
        torch.testing.assert_close(run(torch.tensor([logits]), *args)[0], expected)
    greedy = run(torch.tensor([logits]), torch.zeros(1), torch.tensor([0]), torch.ones(1), torch.zeros(1))
    assert greedy[0].tolist() == [0, 0, 1, 0, 0]


@each("process_logits")
class TestProcessLogits:
    def test_order_and_meaning_of_every_edit(self, run):
        logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [2.0, -2.0, 1.0, 0.5], [1.0, 2.0, 3.0, 4.0]])
        before = logits.clone()
        edits = LogitEdits(
            penalties=Penalties(
                torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([2.0, 2.0]), torch.tensor([0.0, 0.25])
            ),
            bias=Bias(torch.tensor([0, 1]), torch.tensor([0, 3]), torch.tensor([-3.0, 1.5])),
            banned=Marks(torch.tensor([1, 2]), torch.tensor([0, 3])),
            allowed=Marks(torch.tensor([2, 2]), torch.tensor([1, 3])),
        )
        expected = torch.tensor([[-2.0, -4.25, 1.0, 0.5], [-INF, -2.0, 1.0, 2.0], [-INF, 2.0, -INF, -INF]])
        assert torch.equal(run(logits, edits), expected)
        assert torch.equal(logits, before)

    def test_a_mask_keeps_what_has_a_bit_of_what_was_left(self, run):
        logits = torch.randn(3, 70)
        stays = torch.zeros(96, dtype=torch.bool)
        stays[[0, 31, 32, 63, 64, 69, 80]] = True  # the last is behind the vocabulary
        words = (stays.view(3, 32).long() << torch.arange(32)).sum(1)
        bits = torch.stack([words, torch.zeros(3, dtype=torch.int64)]).to(torch.int32)
        edits = LogitEdits(
            banned=Marks(torch.tensor([2, 1]), torch.tensor([63, 5])), masks=Masks(torch.tensor([2, 0]), bits)
        )
        expected = logits.clone()
        expected[1, 5] = -INF
        expected[0] = -INF
        expected[2, ~stays[:70]] = -INF
        expected[2, 63] = -INF
        assert torch.equal(run(logits, edits), expected)

    def test_no_edits_change_nothing(self, run):
        logits = torch.randn(3, 7)
        assert torch.equal(run(logits, LogitEdits()), logits)


@each("token_logprobs", leave_out=INTERPRETED)
class TestTokenLogprobs:
    @given(
        rows=st.lists(st.lists(st.integers(-3, 3), min_size=9, max_size=9), min_size=1, max_size=4),
        k=st.integers(0, 9),
        token=st.integers(0, 8),
    )
    @settings(max_examples=80, deadline=None)
    def test_equals_its_definition(self, run, rows, k, token):
        logits = torch.tensor(rows, dtype=torch.float32)
        found = run(logits, torch.full((len(rows),), token), k)
        for i, row in enumerate(rows):
            total = math.log(sum(math.exp(x) for x in row))
            assert found.logprob[i].item() == pytest.approx(row[token] - total, abs=1e-5)
            assert found.rank[i].item() == 1 + sum(x > row[token] for x in row)
            ranked = sorted(range(9), key=lambda j: (-row[j], j))[:k]
            assert found.top_ids[i].tolist() == ranked
            assert found.top_logprobs[i].tolist() == pytest.approx([row[j] - total for j in ranked], abs=1e-5)

    def test_a_greedy_choice_is_told_by_equality(self, run):
        logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(4)) * 5
        best = run(logits, logits.argmax(dim=-1), 3)
        assert torch.equal(best.logprob, best.top_logprobs[:, 0])
        assert best.rank.eq(1).all()
        second = run(logits, best.top_ids[:, 1], 1)
        assert second.logprob.lt(second.top_logprobs[:, 0]).all()

    def test_a_row_does_not_depend_on_its_company(self, run):
        logits = torch.randn(5, 33_001, generator=torch.Generator().manual_seed(5))
        ids = torch.arange(5)
        together = run(logits, ids, 4)
        for i in range(5):
            for whole, alone in zip(together, run(logits[i : i + 1], ids[i : i + 1], 4), strict=True):
                assert torch.equal(whole[i : i + 1], alone)
