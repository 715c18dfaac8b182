"""Products by matrix tiles: ragged shapes, bits, strides, and what packing has to get right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.kernels import Target
from quire.kernels.cpu.native import linear, linear_quantized
from quire.kernels.packed import PackedWeight, weight_format
from quire.kernels.testing import NAN, assert_close, normal, pair

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    linear.has_tiles(Target("cpu", BF16, 64, "bf16")) is not None, reason="no matrix tiles on this machine"
)
OPS = ("linear", "logits", "linear_int8", "linear_int4")
ROWS = (1, 2, 3, 5, 15, 16, 17, 33, 64, 100)


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(op: str, outputs: int, inputs: int, group: int | None = None) -> tuple[object, Tensor]:
    """A weight as the op takes it, and as it is."""
    values = normal((outputs, inputs), torch.float32) / inputs**0.5
    if op in ("linear", "logits"):
        return values.to(BF16), values.to(BF16).double()
    spec = weight_format(op.removeprefix("linear_"))
    weight = spec.quantize(values, group)
    return weight, spec.dequantize(weight).double()


def check(op: str, outputs: int, inputs: int, rows: tuple[int, ...], group: int | None = None) -> None:
    """Against the exact product, and each number of rows against the first of them, bit by bit."""
    ours, _ = pair(op, "native")
    weight, exact = make(op, outputs, inputs, group)
    bias, x = normal((outputs,), BF16, 1), normal((max(rows), inputs), BF16, 2)
    packed = ours.prepare(weight, bias)
    assert isinstance(packed, linear.Packed)
    whole = ours.run(x, packed)
    assert whole.dtype == (torch.float32 if op == "logits" else BF16)
    assert_close(whole, x.double() @ exact.T + bias.double(), whole.dtype)
    for count in rows:
        assert torch.equal(ours.run(x[:count], packed), whole[:count])
        assert torch.equal(ours.run(x[-count:], packed), whole[-count:])


@pytest.mark.parametrize("op", OPS)
def test_ragged_rows_and_outputs(op: str) -> None:
    for outputs, inputs in ((1, 64), (37, 256), (72, 320), (131, 1056)):
        check(op, outputs, inputs, ROWS, 32 if op == "linear_int4" else None)


@pytest.mark.parametrize("op", ["linear", "logits", "linear_int8"])
def test_inputs_that_fill_no_tile(op: str) -> None:
    for outputs, inputs in ((40, 7), (33, 203), (16, 33)):
        check(op, outputs, inputs, (1, 16, 17, 33))


@pytest.mark.parametrize("op", ["linear_int8", "linear_int4"])
@pytest.mark.parametrize("group", [0, 32, 64, 96, 128, 384, 576])
def test_groups(op: str, group: int) -> None:
    check(op, 40, 1152, (1, 3, 16, 17, 70), group)


@pytest.mark.parametrize("op", ["linear_int8", "linear_int4"])
def test_units_that_no_four_tiles_fill(op: str) -> None:
    for outputs in (16 * 17, 16 * 18 + 3, 16 * 35):
        check(op, outputs, 160, (1, 3, 16, 17, 48), 32)


@pytest.mark.parametrize("op", OPS)
def test_many_rows_with_many_inputs(op: str) -> None:
    """More than a unit's rows, and inputs for which x is laid out in several reaches."""
    check(op, 65, 3072, (1, 17, 300, 530), 128 if op == "linear_int4" else None)


@pytest.mark.parametrize("op", OPS)
def test_an_output_that_goes_past_the_caches(op: str) -> None:
    check(op, 2048, 128, (1, 16, 160), None)


def test_every_code_of_eight_bits() -> None:
    codes = torch.arange(-128, 128).to(torch.int8).repeat(8)[: 16 * 128].view(16, 128)
    weight = replace(make_int8(16, 128), codes=codes, scales=torch.ones(1, 16))
    ours, _ = pair("linear_int8", "native")
    packed = ours.prepare(weight, None)
    for count in (16, 128):
        x = torch.eye(128, dtype=BF16)[:count]
        assert torch.equal(ours.run(x, packed).double(), codes.T[:count].double())


def make_int8(outputs: int, inputs: int) -> PackedWeight:
    return weight_format("int8").quantize(normal((outputs, inputs), torch.float32), None)


@pytest.mark.parametrize("op", OPS)
def test_rows_of_a_wider_tensor(op: str) -> None:
    """What is beside a row is never read, and NaN stays in its row."""
    ours, _ = pair(op, "native")
    weight, exact = make(op, 48, 256)
    packed = ours.prepare(weight, None)
    for count in (5, 40):
        wide = torch.full((count + 1, 384), NAN, dtype=BF16)
        wide[:count, 16:272] = normal((count, 256), BF16, 1)
        x = wide[:count, 16:272]
        result = ours.run(x, packed)
        assert_close(result, x.double() @ exact.T, result.dtype)
        wide[2, 20] = NAN
        spoilt = ours.run(x, packed)
        assert spoilt[2].isnan().all()
        assert spoilt.isnan().sum() == 48
        others = torch.arange(count) != 2
        assert torch.equal(spoilt[others], result[others])


def test_infinite_rows_do_not_spoil_others() -> None:
    ours, _ = pair("linear_int4", "native")
    weight, _ = make("linear_int4", 48, 256)
    packed, x = ours.prepare(weight, None), normal((20, 256), BF16)
    before = ours.run(x, packed)
    x[7, 3] = float("inf")
    after, others = ours.run(x, packed), torch.arange(20) != 7
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("op", ["linear_int8", "linear_int4"])
class TestColumnOrder:
    def order(self, torn: bool) -> Tensor:
        draw = torch.Generator().manual_seed(5)
        if torn:
            return torch.randperm(256, generator=draw)
        groups = torch.randperm(4, generator=draw)
        return torch.cat([64 * g + torch.randperm(64, generator=draw) for g in groups.tolist()])

    def test_is_undone_where_groups_stay_together(self, op: str) -> None:
        plain, _ = make(op, 40, 256, 64)
        assert isinstance(plain, PackedWeight)
        self.compare(op, replace(plain, order=self.order(torn=False)), native=True)

    def test_is_left_to_the_reference_where_groups_are_torn(self, op: str, caplog: pytest.LogCaptureFixture) -> None:
        plain, _ = make(op, 40, 256, 64)
        assert isinstance(plain, PackedWeight)
        self.compare(op, replace(plain, order=self.order(torn=True)), native=False)
        assert "tears groups apart" in caplog.text

    def compare(self, op: str, weight: PackedWeight, native: bool) -> None:
        ours, oracle = pair(op, "native")
        packed, x = ours.prepare(weight, None), normal((9, 256), BF16, 1)
        assert isinstance(packed, linear.Packed) == native
        assert_close(ours.run(x, packed), oracle.run(x, oracle.prepare(weight, None)), BF16)


def test_a_weight_without_zero_points() -> None:
    ours, oracle = pair("linear_int4", "native")
    weight, _ = make("linear_int4", 40, 256, 64)
    assert isinstance(weight, PackedWeight)
    symmetric, x = replace(weight, zeros=None), normal((9, 256), BF16, 1)
    assert_close(ours.run(x, ours.prepare(symmetric, None)), oracle.run(x, oracle.prepare(symmetric, None)), BF16)


def test_words_hold_the_codes_where_the_layout_says() -> None:
    codes = torch.randint(0, 16, (32, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    words = linear_quantized.as_words(codes).view(torch.int16).view(2, 2, 4, 32).int() & 0xFFFF
    for output, k in ((0, 0), (5, 9), (17, 31), (31, 32), (20, 63)):
        pair_of_inputs, parity = k % 32 // 2, k % 2
        word = words[output // 16, k // 32, pair_of_inputs // 4, 2 * (output % 16) + parity]
        assert word >> 4 * (pair_of_inputs % 4) & 15 == codes[output, k]


def test_no_rows() -> None:
    ours, _ = pair("logits", "native")
    weight, _ = make("logits", 48, 64)
    assert ours.run(torch.empty(0, 64, dtype=BF16), ours.prepare(weight, None)).shape == (0, 48)


def test_logits_keep_what_bf16_would_round() -> None:
    weight, exact = make("logits", 64, 128)
    x = normal((3, 128), BF16, 1)
    ours, oracle = pair("logits", "native")
    result = ours.run(x, ours.prepare(weight, None))
    torch.testing.assert_close(result.double(), x.double() @ exact.T, rtol=1e-5, atol=1e-5)
    assert not torch.equal(result, result.to(BF16).float())
    torch.testing.assert_close(result, oracle.run(x, oracle.prepare(weight, None)), rtol=2**-8, atol=1e-5)
