"""Activations in eight bits: the reference against its definition, every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.packed import QuantizedRows, RowFormat
from quire.kernels.reference.rows import dequantize_rows, quantize_rows
from quire.kernels.testing import NAN, assert_close, challengers, normal, pair

E4M3 = torch.float8_e4m3fn
FORMATS = [
    RowFormat(torch.int8),
    RowFormat(torch.int8, 128),
    RowFormat(torch.int8, scale=torch.tensor(0.02)),
    RowFormat(E4M3),
    RowFormat(E4M3, 128),
    RowFormat(E4M3, scale=torch.tensor(0.007)),
]
NAMES = [
    f"{'e4m3' if f.codes == E4M3 else 'int8'}-{f.group or 'row'}-{'dynamic' if f.scale is None else 'static'}"
    for f in FORMATS
]
of_every_format = pytest.mark.parametrize("to", FORMATS, ids=NAMES)


def rank(codes: torch.Tensor) -> torch.Tensor:
    """Codes as consecutive integers in the order of their values, so that neighbours differ by one."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def assert_rows_close(actual: QuantizedRows, expected: QuantizedRows, exact: bool) -> None:
    """exact: the same codes and scales; else scales of another order of summation, and neighbours here and there."""
    assert (actual.dtype, actual.codes.dtype) == (expected.dtype, expected.codes.dtype)
    assert (actual.codes.shape, actual.scales.shape) == (expected.codes.shape, expected.scales.shape)
    torch.testing.assert_close(actual.scales, expected.scales, rtol=0 if exact else 1e-5, atol=0)
    apart = (rank(actual.codes) - rank(expected.codes)).abs()
    if apart.numel():
        assert int(apart.max()) <= (0 if exact else 1)
        assert apart.float().mean() <= 0.01


@of_every_format
def test_the_reference_is_within_half_a_step(to: RowFormat) -> None:
    x = normal((9, 320), torch.float32)
    rows = quantize_rows(x, to)
    assert rows.scales.shape == (9, 3 if to.group else 1)
    scales = rows.scales.repeat_interleave(to.group or 320, -1)[:, :320]
    largest = 127.0 if to.codes == torch.int8 else 448.0
    kept = (x / scales).clamp(-largest, largest) * scales
    half_a_step = 0.5 * scales if to.codes == torch.int8 else torch.maximum(kept.abs() / 16, scales / 1024)
    assert bool(((dequantize_rows(rows) - kept).abs() <= half_a_step * (1 + 1e-5)).all())


@given(seed=st.integers(0, 1000), width=st.integers(1, 300), magnitude=st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_the_largest_of_a_row_has_the_largest_code(seed: int, width: int, magnitude: float) -> None:
    x = magnitude * normal((3, width), torch.float32, seed)
    for codes, largest in ((torch.int8, 127), (E4M3, 448)):
        rows = quantize_rows(x, RowFormat(codes))
        top = rows.codes.float().abs().gather(1, x.abs().argmax(-1, keepdim=True))
        assert bool((top == largest).all())


@pytest.mark.parametrize("name", ["reference", *sorted({name for name, _ in challengers("quantize_rows")})])
@of_every_format
def test_zeros_have_the_scale_one(name: str, to: RowFormat) -> None:
    ours, _ = pair("quantize_rows", name)
    x = normal((4, 256), torch.float32)
    x[1] = 0
    x[2, :128] = 0
    rows = ours.run(x, to)
    assert not rows.codes[1].float().any()
    assert not rows.codes[2, :128].float().any()
    if to.scale is None:
        assert bool((rows.scales[1] == 1).all())
    assert bool(rows.scales.isfinite().all())


@pytest.mark.parametrize(("name", "dtype"), challengers("quantize_rows"))
@of_every_format
def test_quantize_rows(name: str, dtype: torch.dtype, to: RowFormat) -> None:
    ours, oracle = pair("quantize_rows", name)
    for shape in ((0, 96), (1, 7), (5, 96), (33, 128), (3, 896), (2, 4300)):
        x = normal(shape, dtype, seed=shape[1])
        assert_rows_close(ours.run(x, to), oracle.run(x, to), exact=True)


@pytest.mark.parametrize(("name", "dtype"), challengers("rms_norm_rows"))
@of_every_format
def test_rms_norm_rows(name: str, dtype: torch.dtype, to: RowFormat) -> None:
    ours, oracle = pair("rms_norm_rows", name)
    for shape, offset in (((0, 96), 0.0), ((1, 7), 1.0), ((33, 96), 0.0), ((5, 896), 1.0)):
        x, weight = normal(shape, dtype), normal(shape[-1:], dtype, 1)
        assert_rows_close(ours.run(x, weight, 1e-6, offset, to), oracle.run(x, weight, 1e-6, offset, to), exact=False)


@pytest.mark.parametrize(("name", "dtype"), challengers("add_rms_norm_rows"))
@of_every_format
def test_add_rms_norm_rows(name: str, dtype: torch.dtype, to: RowFormat) -> None:
    ours, oracle = pair("add_rms_norm_rows", name)
    for shape in ((0, 96), (1, 7), (33, 96), (5, 896)):
        # Sums that bf16 holds, so that its rounding, which Triton's interpreter does otherwise, decides no code.
        x, residual = (normal(shape, torch.float32, seed).mul(8).round().div(8).to(dtype) for seed in (0, 1))
        weight = normal(shape[-1:], dtype, 2)
        expected, expected_total = oracle.run(x.clone(), residual.clone(), weight, 1e-6, 0.0, to)
        rows, total = ours.run(x, residual, weight, 1e-6, 0.0, to)
        assert_rows_close(rows, expected, exact=False)
        assert_close(total, expected_total, dtype)


@pytest.mark.parametrize("op", ["silu_and_mul_rows", "gelu_and_mul_rows"])
@of_every_format
def test_gated_rows(op: str, to: RowFormat) -> None:
    for name, dtype in challengers(op):
        ours, oracle = pair(op, name)
        for shape in ((0, 192), (1, 14), (33, 192), (5, 1792), (2, 8600)):
            x = 3 * normal(shape, dtype)
            assert_rows_close(ours.run(x.clone(), to), oracle.run(x, to), exact=False)


@pytest.mark.parametrize(("name", "dtype"), challengers("quantize_rows"))
def test_a_row_is_quantized_alike_in_any_company(name: str, dtype: torch.dtype) -> None:
    ours, _ = pair("quantize_rows", name)
    x = normal((40, 200), dtype)
    for to in (RowFormat(torch.int8), RowFormat(E4M3, 128)):
        whole, alone = ours.run(x, to), ours.run(x[7:8], to)
        assert torch.equal(whole.codes[7:8].float(), alone.codes.float())
        assert torch.equal(whole.scales[7:8], alone.scales)


@pytest.mark.parametrize(("name", "dtype"), challengers("quantize_rows"))
def test_nothing_beyond_a_row_is_read(name: str, dtype: torch.dtype) -> None:
    """Rows of a wider tensor whose other columns are NaN, for every op that quantizes."""
    wide = torch.full((6, 700), NAN, dtype=dtype)
    wide[:, :200] = normal((6, 200), dtype)
    x = wide[:, :200]
    weight = torch.full((220,), NAN, dtype=dtype)
    weight[:200] = 1.0
    for to in FORMATS:
        runs = {
            "quantize_rows": (x, to),
            "rms_norm_rows": (x, weight[:200], 1e-6, 0.0, to),
            "silu_and_mul_rows": (x, to),
            "gelu_and_mul_rows": (x, to),
        }
        for op, arguments in runs.items():
            ours, oracle = pair(op, name)
            assert_rows_close(ours.run(*arguments), oracle.run(*arguments), exact=op == "quantize_rows")
