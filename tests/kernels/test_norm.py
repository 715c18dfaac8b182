"""RMS norm: every implementation against the reference, the reference against the formula."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.norm import rms_norm
from quire.kernels.testing import assert_close, cases, challengers, normal, pair


def test_the_reference_is_the_formula() -> None:
    x, weight = normal((3, 8), torch.float32), normal((8,), torch.float32, 1)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, 1.0), expected)


@pytest.mark.parametrize(("name", "dtype"), challengers("rms_norm"))
@pytest.mark.parametrize("shape", [(0, 96), (1, 96), (7, 100), (65, 896), (5, 3, 64)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    ours, oracle = pair("rms_norm", name)
    x, weight = normal(shape, dtype), normal(shape[-1:], dtype, 1)
    result = ours.run(x, weight, 1e-6, offset)
    assert result.dtype == dtype
    assert_close(result, oracle.run(x, weight, 1e-6, offset), dtype)


@pytest.mark.parametrize(("name", "dtype"), challengers("rms_norm"))
def test_a_view_of_a_wider_tensor(name: str, dtype: torch.dtype) -> None:
    ours, oracle = pair("rms_norm", name)
    heads = normal((9, 6, 64), dtype)[:, :4]
    weight = normal((64,), dtype, 1)
    assert_close(ours.run(heads, weight, 1e-6, 0.0), oracle.run(heads, weight, 1e-6, 0.0), dtype)


@pytest.mark.parametrize(("name", "dtype"), cases("rms_norm"))
def test_rows_are_independent(name: str, dtype: torch.dtype) -> None:
    ours, _ = pair("rms_norm", name)
    x, weight = normal((64, 896), dtype), normal((896,), dtype, 1)
    whole = ours.run(x, weight, 1e-6, 0.0)
    assert torch.equal(whole[5:6], ours.run(x[5:6], weight, 1e-6, 0.0))


@pytest.mark.parametrize(("name", "dtype"), challengers("add_rms_norm"))
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm(name: str, dtype: torch.dtype, offset: float) -> None:
    ours, oracle = pair("add_rms_norm", name)
    x, residual, weight = normal((17, 96), dtype), normal((17, 96), dtype, 1), normal((96,), dtype, 2)
    expected = oracle.run(x.clone(), residual.clone(), weight, 1e-6, offset)
    normed, total = ours.run(x, residual, weight, 1e-6, offset)
    assert_close(normed, expected[0], dtype)
    assert_close(total, expected[1], dtype)
