"""Mixtures of experts against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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
