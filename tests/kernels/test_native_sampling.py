"""The compiled sampling beyond what every implementation is tested for: instruction sets, threads, widths, odd rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quire.kernels.cpu.native import library
from quire.kernels.reference.sampling import Bias, LogitEdits, Marks, Masks, Penalties
from quire.kernels.testing import normal, pair

pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))

INF, NAN = math.inf, math.nan
# Around a vector of 16, a group of 64 with one peak, and a piece of 8,192.
WIDTHS = (1, 15, 17, 64, 65, 1000, 8193, 20_011)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def filters(**columns: list[float]) -> dict[str, Tensor]:
    """Columns of `probabilities`; what is not named is off."""
    (count,) = {len(column) for column in columns.values()}
    given = {"temperature": [1.0], "top_k": [0], "top_p": [1.0], "min_p": [0.0]} | columns
    dtypes = {"top_k": torch.int64}
    return {
        name: torch.tensor(column * (count // len(column)), dtype=dtypes.get(name, torch.float32))
        for name, column in given.items()
    }


def sources(count: int) -> dict[str, Tensor]:
    numbers = torch.arange(count)
    return {"seeds": numbers * 0x9E3779B97F4A7C15 - 7, "sample_index": numbers % 3, "positions": numbers * 100_003}


MIXED = filters(
    temperature=[0, 0.3, 0.7, 1, 1, 2.5, 1, 1e-30, 1e30],
    top_k=[5, 0, 40, 0, 0, 3, 700, 2, 0],
    top_p=[1, 1, 0.8, 0.9, 1, 1, 0.5003, 1, 1],
    min_p=[0, 0, 0.01, 0, 0.0201, 0, 0, 0, 0],
)


@pytest.mark.usefixtures("level")
class TestLevels:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_draws(self, width: int) -> None:
        logits = normal((9, width), torch.float32, width) * torch.tensor([4.0, 0.5, 8.0]).repeat(3)[:, None]
        ours, oracle = pair("sample", "native")
        assert torch.equal(ours.run(logits, **MIXED, **sources(9)), oracle.run(logits, **MIXED, **sources(9)))
        ours, oracle = pair("probabilities", "native")
        torch.testing.assert_close(ours.run(logits, **MIXED), oracle.run(logits, **MIXED), rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("width", WIDTHS)
    def test_greedy(self, width: int) -> None:
        logits = normal((9, width), torch.float32, width).mul(8).round()
        logits[3, width // 2] = NAN
        logits[4] = -INF
        logits[5, -1] = INF
        ours, oracle = pair("greedy", "native")
        for found, right in zip(ours.run(logits), oracle.run(logits), strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("width", WIDTHS)
    def test_logprobs(self, width: int) -> None:
        logits = normal((5, width), torch.float32, width).mul(16).round() / 4
        logits[2, : width // 2] = -INF
        ids = torch.arange(5) * 7 % width
        ours, oracle = pair("token_logprobs", "native")
        for k in {0, 1, min(20, width), width}:
            found, right = ours.run(logits, ids, k), oracle.run(logits, ids, k)
            assert torch.equal(found.rank, right.rank)
            assert torch.equal(found.top_ids, right.top_ids)
            torch.testing.assert_close(found.logprob, right.logprob, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(found.top_logprobs, right.top_logprobs, rtol=2e-6, atol=2e-6)

    def test_edits(self) -> None:
        rows, width = 6, 8200
        generator = torch.Generator().manual_seed(0)

        def pairs(count: int) -> tuple[Tensor, Tensor]:
            """Pairs in no order, each at most once."""
            flat = torch.randperm(rows * width, generator=generator)[:count]
            return flat // width, flat % width

        edits = LogitEdits(
            Penalties(*pairs(500), torch.rand(500, generator=generator) + 0.5, torch.rand(500, generator=generator)),
            Bias(*pairs(300), torch.randn(300, generator=generator)),
            Marks(*pairs(200)),
            Marks(torch.tensor([4, 1, 4, 1]), torch.tensor([8199, 0, 3, 70])),
            Masks(torch.tensor([5, 1, 0]), torch.randint(-(2**31), 2**31, (3, 257), generator=generator).int()),
        )
        logits = normal((rows, width), torch.float32)
        ours, oracle = pair("process_logits", "native")
        assert torch.equal(ours.run(logits, edits), oracle.run(logits, edits))

    def test_noise_is_the_references(self) -> None:
        """Where all tokens are as likely, the noise alone decides."""
        logits = torch.zeros(400, 131)
        warm = filters(temperature=[1.0] * 400)
        ours, oracle = pair("sample", "native")
        assert torch.equal(ours.run(logits, **warm, **sources(400)), oracle.run(logits, **warm, **sources(400)))

    @pytest.mark.parametrize("step", [1e-4, 1e-2, -1e-2, 3.0])
    def test_logits_that_keep_rising(self, step: float) -> None:
        logits = (torch.arange(9000) * step).repeat(4, 1)
        warm = filters(temperature=[1.0] * 4)
        ours, oracle = pair("sample", "native")
        assert torch.equal(ours.run(logits, **warm, **sources(4)), oracle.run(logits, **warm, **sources(4)))


class TestKept:
    """Which tokens the filters leave, where the numbers are exact."""

    @pytest.mark.parametrize("k", [1, 63, 64, 65, 128, 255, 256, 300])
    def test_ties_at_the_cut_go_to_the_lower_ids(self, k: int) -> None:
        kept = pair("probabilities", "native")[0].run(torch.full((1, 256), 2.0), **filters(top_k=[k]))[0] > 0
        assert kept.nonzero().flatten().tolist() == list(range(min(k, 256)))
        kept = pair("probabilities", "native")[0].run(torch.zeros(1, 256), **filters(top_p=[min(k, 256) / 256]))[0] > 0
        assert kept.nonzero().flatten().tolist() == list(range(min(k, 256)))

    def test_ties_that_lie_scattered(self) -> None:
        logits = torch.full((1, 3000), -1.0)
        equals = torch.arange(5, 3000, 100)
        logits[0, equals] = 0.0
        logits[0, 2000] = 1.0
        kept = pair("probabilities", "native")[0].run(logits, **filters(top_k=[11]))[0] > 0
        assert kept.nonzero().flatten().tolist() == sorted([*equals[:10].tolist(), 2000])

    def test_neighbours_in_the_last_bit_are_told_apart(self) -> None:
        logits = torch.full((1, 500), -3.0)
        logits[0, 7] = 0.0
        logits[0, 400] = torch.nextafter(torch.tensor(-3.0), torch.tensor(0.0))
        kept = pair("probabilities", "native")[0].run(logits, **filters(top_k=[3]))[0] > 0
        assert kept.nonzero().flatten().tolist() == [0, 7, 400]

    def test_the_most_likely_always_stays(self) -> None:
        logits = normal((3, 200), torch.float32)
        chosen = filters(top_p=[0.0, 1e-9, 1.0], min_p=[0.0, 0.0, 2.0])
        found = pair("probabilities", "native")[0].run(logits, **chosen)
        assert torch.equal(found, torch.nn.functional.one_hot(logits.argmax(-1), 200).float())

    @pytest.mark.parametrize("params", [{"top_p": [0.9]}, {"top_k": [50]}, {"temperature": [1.3]}], ids=str)
    def test_a_long_vocabulary(self, params: dict[str, list[float]]) -> None:
        logits, chosen = normal((1, 152_064), torch.float32) * 3, filters(**params)
        ours, oracle = pair("sample", "native")
        assert torch.equal(ours.run(logits, **chosen, **sources(1)), oracle.run(logits, **chosen, **sources(1)))

    @pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
    @pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
    def test_the_nucleus_of_a_long_vocabulary(self, top_p: float, scale: float) -> None:
        """By its definition in float64: the reference's fp32 softmax is off by a token of such a distribution."""
        logits = normal((1, 152_064), torch.float32) * scale
        exact = logits[0].double().softmax(-1)
        found = pair("probabilities", "native")[0].run(logits, **filters(top_p=[top_p]))[0]
        nucleus = exact[found > 0]
        assert exact[found == 0].max() <= nucleus.min()
        assert nucleus.sum() - nucleus.min() - 1e-7 < top_p < nucleus.sum() + 1e-7
        torch.testing.assert_close(found[found > 0].double(), nucleus / nucleus.sum(), rtol=3e-6, atol=0)


def everything(logits: Tensor, warm: dict[str, Tensor], source: dict[str, Tensor]) -> list[Tensor]:
    ids = torch.arange(len(logits)) % logits.shape[1]
    return [
        *pair("greedy", "native")[0].run(logits),
        pair("sample", "native")[0].run(logits, **warm, **source),
        pair("probabilities", "native")[0].run(logits, **warm),
        *pair("token_logprobs", "native")[0].run(logits, ids, 5),
    ]


@pytest.mark.usefixtures("level", "threads")
def test_bits_depend_on_the_row_alone() -> None:
    """Not on the other rows, on the threads, or on how a row lies in memory."""
    logits = normal((9, 20_011), torch.float32) * 3
    source = sources(9)
    torch_threads = torch.get_num_threads()
    together = everything(logits, MIXED, source)
    torch.set_num_threads(1)
    for row in range(9):
        one = slice(row, row + 1)
        wide = torch.zeros(1, 20_100)
        wide[:, 17:-72] = logits[one]
        columns = [{name: column[one] for name, column in group.items()} for group in (MIXED, source)]
        for whole, alone in zip(together[:4], everything(wide[:, 17:-72], *columns)[:4], strict=True):
            assert torch.equal(whole[one], alone)
    ids = torch.arange(9)
    for row in range(9):
        found = pair("token_logprobs", "native")[0].run(logits[row : row + 1], ids[row : row + 1], 5)
        for whole, alone in zip(together[4:], found, strict=True):
            assert torch.equal(whole[row : row + 1], alone)
    torch.set_num_threads(torch_threads)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("odd", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [70, 8999, slice(None)])
def test_an_unsound_row_stays_alone(odd: float, place: int | slice) -> None:
    logits = normal((9, 9000), torch.float32)
    source = sources(9)
    before = everything(logits, MIXED, source)
    logits[5, place] = odd
    for old, new in zip(before, everything(logits, MIXED, source), strict=True):
        others = torch.arange(9) != 5
        assert torch.equal(old[others], new[others])
    _, _, ids, probabilities, logprob, rank, top_ids, _ = everything(logits, MIXED, source)
    assert 0 <= ids[5] < 9000
    assert 1 <= rank[5] <= 9000
    assert 0 <= top_ids[5].min() <= top_ids[5].max() < 9000
    right = pair("token_logprobs", "native")[1].run(logits, torch.arange(9), 5)
    assert logprob[5].isnan() == right.logprob[5].isnan()
    right = pair("probabilities", "native")[1].run(logits, **MIXED)
    torch.testing.assert_close(probabilities[5], right[5], rtol=1e-5, atol=1e-8, equal_nan=True)


class TestLimits:
    @pytest.mark.parametrize("bad", [-1, 7, 2**40])
    def test_ids(self, bad: int) -> None:
        with pytest.raises(IndexError, match="token_logprobs: a row or a token id"):
            pair("token_logprobs", "native")[0].run(torch.zeros(2, 7), torch.tensor([0, bad]), 1)

    @pytest.mark.parametrize("kind", LogitEdits._fields)
    @pytest.mark.parametrize(("row", "column"), [(2, 0), (-1, 0), (0, 7), (0, -1)])
    def test_pairs(self, kind: str, row: int, column: int) -> None:
        rows, columns, ones = torch.tensor([0, row]), torch.tensor([0, column]), torch.ones(2)
        fields = {
            "penalties": Penalties(rows, columns, ones, ones),
            "bias": Bias(rows, columns, ones),
            "banned": Marks(rows, columns),
            "allowed": Marks(rows, columns),
            "masks": Masks(rows, torch.zeros(2, 1 if column == 0 else 2, dtype=torch.int32)),
        }
        with pytest.raises(IndexError, match=r"process_logits: (a row or a token id|masks of 2 words)"):
            pair("process_logits", "native")[0].run(torch.zeros(2, 7), LogitEdits(**{kind: fields[kind]}))

    def test_no_rows(self) -> None:
        none = {name: column[:0] for name, column in MIXED.items()}
        for found in everything(torch.zeros(0, 50), none, sources(0)):
            assert found.shape[0] == 0
        assert pair("process_logits", "native")[0].run(torch.zeros(0, 50), LogitEdits()).shape == (0, 50)
