"""Products of integer codes in C++: bit by bit the reference, at every instruction set and on any number of threads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.kernels.cpu.native import library, linear_w8a8
from quire.kernels.packed import PackedWeight, QuantizedRows, RowFormat
from quire.kernels.reference.rows import quantize_rows
from quire.kernels.testing import normal, pair

pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))
DTYPES = (torch.float32, torch.bfloat16)
ROWS = (0, 1, 3, 5, 16, 17, 33, 48, 70)
# No tile divides them; inputs of one part and of several, odd and even counts of tiles.
SHAPES = ((1, 1), (40, 203), (33, 64), (210, 130), (72, 1348))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(outputs: int, inputs: int, seed: int = 0) -> PackedWeight:
    """Of all codes there are, the largest at the ends."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = 127, -127
    scales = torch.rand(1, outputs, generator=generator) + 0.01
    return PackedWeight("w8a8", outputs, inputs, inputs, codes, scales)


def both(x: Tensor | QuantizedRows, weight: PackedWeight, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """By the native implementation, and by the reference."""
    ours, oracle = pair("linear_w8a8", "native")
    return ours.run(x, ours.prepare(weight, bias)), oracle.run(x, oracle.prepare(weight, bias))


@pytest.mark.usefixtures("level", "threads")
class TestBits:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_equal_to_the_reference(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        weight, bias = make(*shape), normal(shape[:1], dtype, 2)
        ours, oracle = pair("linear_w8a8", "native")
        x = normal((ROWS[-1], shape[1]), dtype, 1)
        for given, counts in ((bias, ROWS), (None, ROWS[1::3])):
            packed = ours.prepare(weight, given)
            expected = oracle.run(x, oracle.prepare(weight, given))
            for rows in counts:
                assert torch.equal(ours.run(x[:rows], packed), expected[:rows])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_in_codes(self, dtype: torch.dtype) -> None:
        weight, x = make(72, 203), normal((40, 203), dtype, 1)
        for to in (RowFormat(torch.int8), RowFormat(torch.int8, scale=torch.tensor(0.02))):  # its scales have no stride
            rows = quantize_rows(x, to)
            for count in (1, 5, 40):
                some = QuantizedRows(rows.codes[:count], rows.scales[:count], dtype)
                assert torch.equal(*both(some, weight, None))

    def test_a_static_scale(self) -> None:
        weight = replace(make(40, 203), input_scale=torch.tensor(0.011))
        x = normal((20, 203), torch.float32, 1)
        x[3, 5], x[4, 200] = 100.0, -100.0  # clamped
        assert torch.equal(*both(x, weight, None))

    def test_ties_are_rounded_to_even(self) -> None:
        x = torch.arange(-127, 128).div(2).repeat(2, 1)
        x[:, 0] = 127.0  # so that the scale is one
        assert torch.equal(*both(x, make(16, 255), None))

    def test_the_largest_sums(self) -> None:
        inputs = linear_w8a8.MOST_INPUTS
        codes = torch.full((17, inputs), 127, dtype=torch.int8)
        codes[1] = -127
        weight = PackedWeight("w8a8", 17, inputs, inputs, codes, torch.ones(1, 17))
        for code in (127, -128):
            x = QuantizedRows(torch.full((2, inputs), code, dtype=torch.int8), torch.ones(2, 1), torch.float32)
            assert torch.equal(*both(x, weight, None))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_strange_rows(self, dtype: torch.dtype) -> None:
        """Zeros, the smallest numbers, the largest, slices of something wider."""
        wide = torch.full((40, 300), float("nan"), dtype=dtype)
        x = wide[:, 50:253]
        x.copy_(normal((40, 203), dtype, 1))
        x[1] = 0
        x[2] = 1e-37
        x[33] *= 1e36
        assert torch.equal(*both(x, make(40, 203), None))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan_stays_in_its_row(self, bad: float) -> None:
        weight, x = make(40, 203), normal((36, 203), torch.float32, 1)
        _, expected = both(x, weight, None)
        x[7, 202] = bad
        ours, _ = both(x, weight, None)
        assert not ours[7].isfinite().any()
        ours[7] = expected[7]
        assert torch.equal(ours, expected)


def test_more_inputs_than_integers_hold(caplog: pytest.LogCaptureFixture) -> None:
    weight = make(3, linear_w8a8.MOST_INPUTS + 1)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(*both(normal((2, weight.inputs), torch.float32), weight, None))
    assert "overflow" in caplog.text
