"""Linear layers against the reference, and what holds of their rows whatever the batch."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.testing import assert_close, cases, normal, pair

SHAPES = [(1000, 64), (1, 7), (96, 33), (1152, 896), (896, 4864)]


@pytest.mark.parametrize(("name", "dtype"), cases("linear"))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(name: str, dtype: torch.dtype, shape: tuple[int, int], with_bias: bool) -> None:
    ours, _ = pair("linear", name)
    n, k = shape
    weight = normal((n, k), torch.float32) / k**0.5
    bias = normal((n,), dtype, 1) if with_bias else None
    weight = weight.to(dtype)
    packed = ours.prepare(weight, bias)
    for rows in (0, 1, 2, 17, 65):
        x = normal((rows, k), dtype, 2)
        expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
        result = ours.run(x, packed)
        assert result.dtype == dtype
        assert_close(result, expected, dtype)


@pytest.mark.parametrize(("name", "dtype"), cases("linear"))
def test_strided_rows(name: str, dtype: torch.dtype) -> None:
    ours, oracle = pair("linear", name)
    weight, x = normal((48, 64), dtype) / 8, normal((9, 100), dtype, 1)[:, 4:68]
    assert_close(
        ours.run(x, ours.prepare(weight, None)), oracle.run(x.contiguous(), oracle.prepare(weight, None)), dtype
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_rows_do_not_see_their_batch_mates(shape: tuple[int, int]) -> None:
    ours, _ = pair("linear", "cpu")
    n, k = shape
    packed, x = ours.prepare(normal((n, k), torch.float32), None), normal((96, k), torch.float32, 1)
    whole = ours.run(x, packed)
    for rows in (1, 2, 3, 8, 16, 33, 64):
        assert torch.equal(ours.run(x[:rows], packed), whole[:rows])
