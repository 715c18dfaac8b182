"""The Triton kernels of sampling, token by token against the reference, in the interpreter where there is no GPU.

The noise is the same integers, so a draw is not compared in distribution but for equality; and what the filters keep is
read off `probabilities`.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from torch import Tensor

from quire.kernels import implementations
from quire.kernels.reference import noise
from quire.kernels.reference.noise import Purpose
from quire.kernels.testing import cases, device_of
from quire.kernels.triton import noise as device_noise
from quire.kernels.triton.order import id_of, order_key, value_of

pytestmark = [
    pytest.mark.skipif("triton" not in [n for n, _ in cases("sample")], reason="neither a GPU nor the interpreter"),
    # Arithmetic with infinities, which a GPU does silently.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
DEVICE = device_of("triton")
INF, NAN = float("inf"), float("nan")


def run(op: str, *args: Tensor | int) -> Tensor | tuple[Tensor, ...]:
    """The Triton implementation, back on the CPU."""
    args = tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)
    result = implementations(op)["triton"].run(*args)
    return result.cpu() if isinstance(result, Tensor) else tuple(r.cpu() for r in result)


def reference(op: str, *args: Tensor | int) -> Tensor | tuple[Tensor, ...]:
    return implementations(op)["reference"].run(*args)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choice(values: list[float], count: int, g: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (count,), generator=g)]


def params(count: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """Every mix of temperature, top_k, top_p and min_p, off ones among them."""
    return (
        choice([0.0, 0.3, 0.7, 1.0, 1.0, 2.5, 1e-6], count, g),
        choice([0, 0, 1, 3, 20, 50, 1000, 10**6], count, g, torch.int64),
        choice([1.0, 1.0, 0.9004, 0.5003, 0.1007, 0.9902, 1e-6], count, g),
        choice([0.0, 0.0, 0.0501, 0.3002, 1.0], count, g),
    )


def sources(count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds of all 64 bits, sample indices, positions."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=g)
    return seeds, torch.randint(5, (count,), generator=g), torch.randint(10**5, (count,), generator=g)


def logits_of(seed: int, rows: int, vocab: int) -> Tensor:
    """Flat and peaked rows; some with many ties, some with most tokens gone."""
    g = generator(seed)
    x = torch.randn(rows, vocab, generator=g) * choice([1.0, 3.0, 6.0], rows, g)[:, None]
    x[1::4] = x[1::4].round()
    x[2::4] = x[2::4].masked_fill(torch.rand(x[2::4].shape, generator=g) < 0.5, -INF)
    return x


UNSOUND = torch.tensor(
    [[0.0, NAN, 1.0, INF, 0.0], [-INF] * 5, [0.0, 2.0, INF, 1.0, INF], [NAN] * 5, [1.0, 2.0, 2.0, -INF, 0.0]]
)


@triton.jit
def draw_noise(seeds, sample_index, positions, words, uniforms, gumbels, PURPOSE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    seed, index, position = tl.load(seeds + row), tl.load(sample_index + row), tl.load(positions + row)
    columns = tl.arange(0, N)
    w0, w1, w2, w3 = device_noise.words(seed, index, position, PURPOSE, columns >> 2)
    tl.store(words + row * N + columns, device_noise.pick(w0, w1, w2, w3, columns).to(tl.int64))
    tl.store(uniforms + row * N + columns, device_noise.uniform_at(seed, index, position, PURPOSE, columns))
    quads = tl.arange(0, N // 4)
    tl.store(gumbels + row * N + columns, device_noise.gumbel_of(seed, index, position, PURPOSE, quads))


@triton.jit
def words_to_noise(words, uniforms, gumbels, N: tl.constexpr):
    word = tl.load(words + tl.arange(0, N)).to(tl.uint32)
    tl.store(uniforms + tl.arange(0, N), device_noise.to_uniform(word))
    tl.store(gumbels + tl.arange(0, N), device_noise.to_gumbel(word))


class TestNoise:
    @pytest.mark.parametrize("purpose", Purpose)
    def test_words_and_uniforms_are_the_references_bit_for_bit(self, purpose):
        rows, n = 12, 512
        seeds, index, positions = sources(rows, generator(int(purpose)))
        seeds[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
        index[:2], positions[:2] = torch.tensor([0, 2**32 - 1]), torch.tensor([0, 2**32 - 1])
        words = torch.empty(rows, n, dtype=torch.int64, device=DEVICE)
        uniforms, gumbels = torch.empty(rows, n, device=DEVICE), torch.empty(rows, n, device=DEVICE)
        source = [x.to(DEVICE) for x in (seeds, index, positions)]
        draw_noise[(rows,)](*source, words, uniforms, gumbels, PURPOSE=int(purpose), N=n)
        assert torch.equal(words.cpu(), noise.words(seeds, index, positions, purpose, n))
        assert torch.equal(uniforms.cpu(), noise.uniform(seeds, index, positions, purpose, n))
        expected = noise.gumbel(seeds, index, positions, purpose, n)
        torch.testing.assert_close(gumbels.cpu(), expected, rtol=3e-7, atol=3e-7)

    def test_both_ends_of_the_words_keep_their_precision(self):
        ends = torch.tensor([*range(1000), *range(2**31 - 12, 2**31 + 12), *range(2**32 - 1024, 2**32)])
        uniforms, gumbels = torch.empty(2048, device=DEVICE), torch.empty(2048, device=DEVICE)
        words_to_noise[(1,)](ends.to(DEVICE), uniforms, gumbels, N=2048)
        assert torch.equal(uniforms.cpu(), noise.to_uniform(ends.float()))
        exact = -(-(-uniforms.cpu().double()).log1p()).log()
        torch.testing.assert_close(gumbels.cpu().double(), exact, rtol=3e-7, atol=3e-7)


@triton.jit
def keys_of(values, keys, ids, back, N: tl.constexpr):
    place = tl.arange(0, N)
    key = order_key(tl.load(values + place), place)
    tl.store(keys + place, key)
    tl.store(ids + place, id_of(key))
    tl.store(back + place, value_of(key))


def test_keys_order_tokens_and_give_them_back():
    values = torch.cat([torch.tensor([0.0, -0.0, NAN, INF, -INF, -NAN, 1e-45, -1e-45]), torch.randn(56).round()])
    keys, ids = (torch.empty(64, dtype=torch.int64, device=DEVICE) for _ in range(2))
    back = torch.empty(64, device=DEVICE)
    keys_of[(1,)](values.to(DEVICE), keys, ids, back, N=64)
    assert torch.equal(keys.cpu().argsort(descending=True), values.sort(descending=True, stable=True).indices)
    assert ids.cpu().tolist() == list(range(64))
    assert torch.equal(back.cpu().nan_to_num(7.0), values.nan_to_num(7.0))


class TestSample:
    @pytest.mark.parametrize(("vocab", "rows"), [(5, 40), (300, 40), (1001, 24), (9001, 12)])
    def test_draws_the_references_tokens(self, vocab, rows):
        g = generator(vocab)
        logits, mix, source = logits_of(vocab, rows, vocab), params(rows, g), sources(rows, g)
        assert torch.equal(run("sample", logits, *mix, *source), reference("sample", logits, *mix, *source))

    @pytest.mark.parametrize("mix", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 3, 0.9, 0.1)], ids=str)
    def test_unsound_rows_give_the_references_token(self, mix):
        rows = len(UNSOUND)
        mix = tuple(torch.full((rows,), value) for value in mix)
        source = sources(rows, generator(1))
        assert torch.equal(run("sample", UNSOUND, *mix, *source), reference("sample", UNSOUND, *mix, *source))

    @pytest.mark.parametrize("temperature", [1e-30, 1e30])
    @pytest.mark.parametrize("top_k", [0, 3])
    def test_no_temperature_overflows(self, temperature, top_k):
        logits = torch.tensor([[1e30, -1e30, 5.0, -INF]]).repeat(8, 1)
        mix = torch.full((8,), temperature), torch.full((8,), top_k), torch.ones(8), torch.zeros(8)
        source = sources(8, generator(2))
        assert torch.equal(run("sample", logits, *mix, *source), reference("sample", logits, *mix, *source))

    def test_a_row_does_not_depend_on_its_company_or_stride(self):
        g = generator(3)
        wide, mix, source = logits_of(3, 5, 9001), params(5, g), sources(5, g)
        together = run("sample", wide, *mix, *source)
        inside = torch.full((5, 9101), NAN)
        inside[:, 50:9051] = wide
        assert torch.equal(run("sample", inside[:, 50:9051], *mix, *source), together)
        for i in range(5):
            one = slice(i, i + 1)
            alone = run("sample", wide[one], *(x[one] for x in mix), *(x[one] for x in source))
            assert torch.equal(alone, together[one])

    def test_no_rows_give_no_tokens(self):
        mix = torch.ones(0), torch.zeros(0, dtype=torch.int64), torch.ones(0), torch.zeros(0)
        assert run("sample", torch.empty(0, 9), *mix, *sources(0, generator(0))).shape == (0,)

    def test_a_vocabulary_beyond_the_keys_is_refused(self):
        mix = torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.zeros(1)
        with pytest.raises(ValueError, match="vocabulary size 1048576"):
            run("sample", torch.zeros(1, 2**20), *mix, *sources(1, generator(0)))

    @pytest.mark.slow
    @pytest.mark.parametrize("filters", [(0, 1.0), (3, 0.95)], ids=str)
    def test_draws_have_the_stated_distribution(self, filters):
        count, logits = 400, torch.tensor([1.0, 0.2, -0.5, 0.9, -1.0])
        top_k, top_p = filters
        mix = torch.full((count,), 1.3), torch.full((count,), top_k), torch.full((count,), top_p), torch.zeros(count)
        p = reference("probabilities", logits[None], *(x[:1] for x in mix))[0].double()
        zeros = torch.zeros(count, dtype=torch.int64)

        def p_value(positions: Tensor) -> float:
            seen = torch.bincount(run("sample", logits.repeat(count, 1), *mix, zeros, zeros, positions), minlength=5)
            assert seen[p == 0].sum() == 0
            return float(stats.chisquare(seen[p > 0].numpy(), (p[p > 0] / p.sum() * count).numpy()).pvalue)

        assert p_value(torch.arange(count)) > 1e-4
        # The planted bug: noise that comes again every twenty positions.
        assert p_value(torch.arange(count) % 20) < 1e-4


@pytest.mark.parametrize(("vocab", "rows"), [(5, 30), (300, 30), (9001, 10)])
def test_the_filters_keep_the_references_tokens(vocab, rows):
    logits, mix = logits_of(vocab + 1, rows, vocab), params(rows, generator(vocab + 1))
    found, expected = run("probabilities", logits, *mix), reference("probabilities", logits, *mix)
    # Where a mass is next to nothing, whether it underflows is up to the exponential.
    visible = torch.maximum(found, expected) > 1e-35
    assert torch.equal((found > 0) & visible, (expected > 0) & visible)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("mix", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 3, 0.9, 0.1)], ids=str)
def test_probabilities_of_unsound_rows_are_nan(mix):
    mix = tuple(torch.full((len(UNSOUND),), value) for value in mix)
    found, expected = run("probabilities", UNSOUND, *mix), reference("probabilities", UNSOUND, *mix)
    torch.testing.assert_close(found, expected, equal_nan=True)


class TestTokenLogprobs:
    @pytest.mark.parametrize("k", [0, 1, 20, 200])
    @pytest.mark.parametrize("vocab", [300, 5000])
    def test_equal_the_references(self, vocab, k):
        logits = logits_of(vocab, 4, vocab)
        logits[0, 7] = NAN
        ids = torch.randint(vocab, (4,), generator=generator(k))
        found, expected = run("token_logprobs", logits, ids, k), reference("token_logprobs", logits, ids, k)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)

    def test_the_whole_vocabulary(self):
        logits = logits_of(9, 4, 40)
        found = run("token_logprobs", logits, torch.arange(4), 40)
        assert torch.equal(found[2], reference("token_logprobs", logits, torch.arange(4), 40)[2])

    def test_a_greedy_choice_is_told_by_equality_in_any_company(self):
        logits = torch.randn(3, 5000, generator=generator(4)) * 5
        best = logits.argmax(dim=-1)
        logprob, rank, top_ids, top_logprobs = run("token_logprobs", logits, best, 3)
        assert torch.equal(logprob, top_logprobs[:, 0])
        assert torch.equal(best, top_ids[:, 0])
        assert rank.eq(1).all()
        alone = run("token_logprobs", logits[1:2], best[1:2], 3)
        assert torch.equal(alone[0], logprob[1:2])
        assert torch.equal(alone[3], top_logprobs[1:2])


def random_trees(seed: int, trees: int, nodes: int, vocab: int) -> tuple[Tensor, ...]:
    """p, q, tokens, parents: siblings drawn from q without replacement; padded rows are NaN."""
    g = generator(seed)
    p = (torch.randn(trees, nodes, vocab, generator=g) * 2).softmax(-1)
    q = (torch.randn(trees, nodes, vocab, generator=g) + 0.6 * p.log()).softmax(-1)
    p[::2] = p[::2].masked_fill(p[::2] < p[::2].mean(-1, keepdim=True) * 0.3, 0.0)
    p /= p.sum(-1, keepdim=True)
    tokens, parents = torch.zeros(trees, nodes, dtype=torch.int64), torch.full((trees, nodes), -1)
    for tree in range(trees):
        rest = q[tree].clone()
        for row in range(1, int(torch.randint(1, nodes + 1, (1,), generator=g))):
            parent = int(torch.randint(max(0, row - 3), row, (1,), generator=g))
            if rest[parent].sum() > 0:
                tokens[tree, row] = torch.multinomial(rest[parent], 1, generator=g)
                rest[parent, tokens[tree, row]] = 0.0
                parents[tree, row] = parent
        padding = (parents[tree] == -1) & (torch.arange(nodes) > 0)
        p[tree, padding], q[tree, padding] = NAN, NAN
    return p, q, tokens, parents


class TestVerify:
    @pytest.mark.parametrize(("nodes", "vocab"), [(2, 33), (5, 5), (9, 300), (6, 5000)])
    def test_walks_the_references_path(self, nodes, vocab):
        tree = random_trees(nodes, 14, nodes, vocab)
        source = sources(14, generator(nodes))
        found, expected = run("verify", *tree, *source), reference("verify", *tree, *source)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        children = (tree[3] == 0).sum()
        assert 0 < expected[0].sum() < children  # some are taken, some are not

    def test_a_residual_lost_to_rounding_falls_back_to_p(self):
        p = torch.tensor([0.0, 0.5, 0.5, 0.0]).expand(20, 3, 4).contiguous()
        tokens, parents = torch.tensor([[0, 0, 3]]).repeat(20, 1), torch.tensor([[-1, 0, 0]]).repeat(20, 1)
        source = sources(20, generator(8))
        found, expected = (
            run("verify", p, p, tokens, parents, *source),
            reference("verify", p, p, tokens, parents, *source),
        )
        assert not found[0].any()
        assert torch.equal(found[1], expected[1])
        assert set(found[1].tolist()) == {1, 2}

    def test_a_planted_bug_is_caught(self):
        """Verified against another draft than the one it was drawn from, a tree walks elsewhere."""
        p, q, tokens, parents = random_trees(9, 14, 9, 300)
        source = sources(14, generator(9))
        wrong = run("verify", p, q.roll(1, dims=-1), tokens, parents, *source)
        right = reference("verify", p, q, tokens, parents, *source)
        assert not (torch.equal(wrong[0], right[0]) and torch.equal(wrong[1], right[1]))
