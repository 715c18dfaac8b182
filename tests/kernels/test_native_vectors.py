"""Products by vectors at every instruction set, on the layouts of src/linear_args.h, against exact sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.kernels.cpu.native import library
from quire.kernels.cpu.native.linear import Packed, multiply, prepare_linear
from quire.kernels.cpu.native.linear_quantized import prepare_linear_int4, prepare_linear_int8
from quire.kernels.packed import weight_format
from quire.kernels.testing import assert_close, normal

pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))
ROWS = (0, 1, 2, 3, 5, 6, 15, 17, 33, 64)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def prepare(kind: str, outputs: int, inputs: int, dtype: torch.dtype, bias: Tensor | None) -> tuple[Packed, Tensor]:
    """A packed weight, and the fp32 weight [N, K] that it stands for. kind: floats, or a format/group."""
    weight = normal((outputs, inputs), torch.float32) / inputs**0.5
    if kind == "floats":
        return prepare_linear(weight.to(dtype), bias), weight.to(dtype).float()
    name, group = kind.split("/")
    spec = weight_format(name)
    quantized = spec.quantize(weight, int(group))
    if name == "int4" and int(group) == 64:
        quantized = replace(quantized, zeros=None)
    packed = (prepare_linear_int4 if name == "int4" else prepare_linear_int8)(quantized, bias)
    return packed, spec.dequantize(quantized)


KINDS = [
    ("floats", 131, 203),
    ("floats", 72, 320),
    ("int8/0", 131, 203),
    ("int8/64", 40, 320),
    ("int4/0", 33, 320),
    ("int4/32", 131, 320),
    ("int4/64", 70, 192),
    ("int4/128", 16, 256),
]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "outputs", "inputs"), KINDS)
def test_products(kind: str, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Ragged rows that are slices of something wider; a row's bits are those it has alone."""
    bias = normal((outputs,), dtype, 3) if inputs % 64 else None
    packed, weight = prepare(kind, outputs, inputs, dtype, bias)
    wide = torch.full((ROWS[-1], inputs + 40), float("nan"), dtype=dtype)
    x = wide[:, 8 : 8 + inputs]
    x.copy_(normal((ROWS[-1], inputs), dtype, 1))
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    whole = multiply(x, packed, dtype)
    assert_close(whole, exact, dtype)
    for rows in ROWS:
        assert torch.equal(multiply(x[:rows], packed, dtype), whole[:rows])
    if dtype == torch.bfloat16:
        assert_close(multiply(x, packed, torch.float32), exact, dtype)


@pytest.mark.usefixtures("level")
def test_nan_stays_in_its_row() -> None:
    packed, _ = prepare("int4/32", 48, 96, torch.float32, None)
    x = normal((7, 96), torch.float32, 1)
    expected = multiply(x, packed, torch.float32)
    x[2, 95] = float("nan")
    result = multiply(x, packed, torch.float32)
    assert result[2].isnan().all()
    result[2] = expected[2]
    assert torch.equal(result, expected)


@pytest.mark.usefixtures("level")
def test_more_rows_than_a_panel_serves() -> None:
    packed, weight = prepare("floats", 40, 72, torch.float32, None)
    x = normal((1100, 72), torch.float32, 1)
    assert_close(multiply(x, packed, torch.float32), x.double() @ weight.double().T, torch.float32)
