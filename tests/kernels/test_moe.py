"""Mixtures of experts against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from quire.kernels.packed import stack_experts, weight_format, weight_formats
from quire.kernels.testing import assert_close, cases, normal, pair


def by_token(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for weight, expert in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ row).chunk(2)
            out[t] += weight * (down[expert].double() @ (act(gate) * up))
    return out


@pytest.mark.parametrize(("name", "dtype"), cases("moe"))
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
def test_moe(name: str, dtype: torch.dtype, activation: str, tokens: int) -> None:
    ours, _ = pair("moe", name)
    experts, hidden, ffn, k = 7, 32, 24, 3
    gate_up = (normal((experts, 2 * ffn, hidden), torch.float32) / 6).to(dtype)
    down = (normal((experts, hidden, ffn), torch.float32, 1) / 5).to(dtype)
    x = normal((tokens, hidden), dtype, 2)
    draw = torch.Generator().manual_seed(3)
    ids = torch.rand(tokens, experts - 1, generator=draw).argsort(-1)[:, :k]  # the last expert is never chosen
    weights = torch.rand(tokens, k, generator=draw)
    result = ours.run(x, ours.prepare(gate_up, down), weights, ids, activation)
    assert result.dtype == dtype
    assert_close(result, by_token(x, gate_up, down, weights, ids, activation), dtype)


@pytest.mark.parametrize("name", weight_formats())
def test_quantized_experts_are_their_weights(name: str) -> None:
    """Against the mixture of what the codes stand for; further off only by what eight bits do to the activations."""
    experts, hidden, ffn, k = 4, 64, 96, 2
    form = weight_format(name)
    plain = (
        normal((experts, 2 * ffn, hidden), torch.float32) / 8,
        normal((experts, hidden, ffn), torch.float32, 1) / 10,
    )
    packed = [
        stack_experts([form.quantize(w, 32 if name in ("int4", "int8") else None) for w in each]) for each in plain
    ]
    gate_up, down = (form.dequantize(weight) for weight in packed)
    x = normal((5, hidden), torch.float32, 2)
    draw = torch.Generator().manual_seed(3)
    ids, weights = torch.rand(5, experts, generator=draw).argsort(-1)[:, :k], torch.rand(5, k, generator=draw)
    expected = by_token(x, gate_up, down, weights, ids, "silu")
    allowed = 2e-6 if form.rows(packed[0]) is None else 0.02 if name == "w8a8" else 0.05
    for implementation, dtype in cases(form.moe):
        ours, _ = pair(form.moe, implementation)
        result = ours.run(x.to(dtype), ours.prepare(*packed), weights, ids, "silu")
        assert result.dtype == dtype
        distance = (result.double() - expected).norm() / expected.norm()
        assert distance < max(allowed, 0.02 if dtype == torch.bfloat16 else 0)
        if allowed > 0.01:
            assert distance > 1e-4, "the activations were not quantized"


@pytest.mark.parametrize("name", weight_formats())
def test_no_tokens(name: str) -> None:
    form = weight_format(name)
    packed = [
        stack_experts([form.quantize(normal((n, 64), torch.float32), None if name != "int4" else 32)])
        for n in (128, 64)
    ]
    for implementation, dtype in cases(form.moe):
        ours, _ = pair(form.moe, implementation)
        x, ids = torch.zeros(0, 64, dtype=dtype), torch.zeros(0, 1, dtype=torch.int64)
        assert ours.run(x, ours.prepare(*packed), torch.zeros(0, 1), ids, "silu").shape == (0, 64)
