"""Gated activations against the reference, and the reference against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from quire.kernels.testing import assert_close, cases, challengers, normal, pair


def test_the_references_are_the_definitions() -> None:
    x = normal((4, 12), torch.float32)
    gate, up = x[:, :6], x[:, 6:]
    silu = gate / (1 + torch.exp(-gate)) * up
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    torch.testing.assert_close(pair("silu_and_mul", "reference")[0].run(x), silu)
    torch.testing.assert_close(pair("gelu_and_mul", "reference")[0].run(x), gelu)


@pytest.mark.parametrize("op", ["silu_and_mul", "gelu_and_mul"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 34), (65, 704)])
def test_activation(op: str, shape: tuple[int, int]) -> None:
    for name, dtype in challengers(op):
        ours, oracle = pair(op, name)
        x = 4 * normal(shape, dtype)
        expected = oracle.run(x.clone())
        result = ours.run(x.clone())
        assert result.dtype == dtype
        assert_close(result, expected, dtype)


@pytest.mark.parametrize("name", sorted({name for name, _ in cases("soft_cap")}))
def test_soft_cap(name: str) -> None:
    ours, _ = pair("soft_cap", name)
    for shape in ((0, 8), (1, 5), (3, 7001)):
        x = 20 * normal(shape, torch.float32)
        expected = 30 * torch.tanh(x.double() / 30)
        torch.testing.assert_close(ours.run(x.clone(), 30.0).double(), expected, rtol=3e-6, atol=1e-9)
    edges = torch.tensor([[0.0, 1e-30, 1e30, float("inf"), -float("inf"), float("nan")]])
    expected = torch.tensor([[0.0, 1e-30, 30.0, 30.0, -30.0, float("nan")]])
    torch.testing.assert_close(ours.run(edges, 30.0), expected, equal_nan=True)
