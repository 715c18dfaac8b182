"""Sums of what blocks and experts give."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.testing import NAN, assert_close, cases, normal, pair

SHAPES = [(0, 96), (1, 7), (3, 100), (65, 896)]


@pytest.mark.parametrize(("name", "dtype"), cases("add_residual"))
@pytest.mark.parametrize("shape", SHAPES)
def test_add_residual(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = normal(shape, dtype), normal(shape, dtype, 1)
    expected, before = (x.double() + residual.double()).to(dtype), residual.clone()
    total = pair("add_residual", name)[0].run(x, residual)
    assert total.dtype == dtype
    assert torch.equal(total, expected)
    assert torch.equal(residual, before)


@pytest.mark.parametrize(("name", "dtype"), cases("add_gated"))
@pytest.mark.parametrize("shape", SHAPES)
def test_add_gated(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    out, expert, gate = normal(shape, dtype), normal(shape, dtype, 1), 4 * normal((shape[0], 1), dtype, 2)
    expected = out.double() + torch.sigmoid(gate.double()) * expert.double()
    total = pair("add_gated", name)[0].run(out, gate, expert)
    assert total.dtype == dtype
    assert_close(total, expected, dtype)


@pytest.mark.parametrize(("name", "dtype"), cases("add_gated"))
def test_a_gate_that_is_no_number(name: str, dtype: torch.dtype) -> None:
    out, gate = normal((3, 40), dtype), torch.tensor([[1.0], [NAN], [1.0]], dtype=dtype)
    total = pair("add_gated", name)[0].run(out, gate, torch.ones(3, 40, dtype=dtype))
    assert total.isnan().all(-1).tolist() == [False, True, False]
    assert total.isnan().sum() == 40
