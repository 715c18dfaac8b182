"""The Triton mixture of experts: the order of choices, every size of tile, tails, strides, repeatability."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import implementations
from quire.kernels.packed import PackedWeight, stack_experts, weight_format, weight_formats
from quire.kernels.registry import Target
from quire.kernels.testing import NAN, cases, device_of, normal

if "triton" not in {name for name, _ in cases("rms_norm")}:
    pytest.skip("Triton runs on a GPU or in its interpreter", allow_module_level=True)

from quire.kernels.triton import moe as launches
from quire.kernels.triton.moe_align import align, max_tiles

DEVICE = device_of("triton")


def choices(tokens: int, experts: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Routed weights and distinct experts [tokens, k]; the experts are a view with strides, as of a longer list."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=draw).argsort(-1)[:, :k]
    return torch.rand(tokens, k, generator=draw).to(DEVICE), ids.to(DEVICE)


def weights(name: str, experts: int, d: int, f: int, group: int | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """gate_up and down of op `moe` or `moe_<name>`, of values that keep results near one."""
    plain = (normal((experts, 2 * f, d), torch.float32) / d**0.5, normal((experts, d, f), torch.float32, 1) / f**0.5)
    if name == "plain":
        return tuple(w.to(DEVICE, dtype) for w in plain)  # type: ignore[return-value]
    quantize = weight_format(name).quantize
    return tuple(stack_experts([on_device(quantize(w, group)) for w in each]) for each in plain)  # type: ignore[return-value]


def on_device(weight: PackedWeight) -> PackedWeight:
    weight.codes.data, weight.scales.data = weight.codes.to(DEVICE), weight.scales.to(DEVICE)
    if weight.zeros is not None:
        weight.zeros.data = weight.zeros.to(DEVICE)
    return weight


def both(
    name: str, x: torch.Tensor, experts: tuple[Any, Any], routed: torch.Tensor, ids: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    known = implementations("moe" if name == "plain" else f"moe_{name}")
    ours, oracle = known["triton"], known["reference"]
    return (
        ours.run(x, ours.prepare(*experts), routed, ids, activation),
        oracle.run(x, oracle.prepare(*experts), routed, ids, activation),
    )


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, Frobenius; NaN where there is one."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6)).item()


def tolerance(name: str) -> float:
    """Of fp32: rounding alone, but where activations are quantized, a sum in another order may turn a code or two."""
    return 5e-3 if name in ("w8a8", "fp8", "fp8_block") else 2e-6


@given(
    tokens=st.integers(1, 40), experts=st.integers(1, 9), k=st.integers(1, 3), rows=st.sampled_from([16, 64]),
    skew=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_choices_in_order_of_experts(tokens: int, experts: int, k: int, rows: int, skew: bool, seed: int) -> None:
    k = min(k, experts)
    _, ids = choices(tokens, experts, k, seed)
    if skew:
        ids = torch.arange(k, device=DEVICE).expand(tokens, k).contiguous()
    plan = align(ids.contiguous(), experts, rows)
    n, used = tokens * k, int(plan.tiles)
    expected, owners = [], []
    for expert in range(experts):
        own = (ids.flatten() == expert).nonzero().flatten().tolist()
        tiles = -(-len(own) // rows)
        expected += own + [n] * (tiles * rows - len(own))
        owners += [expert] * tiles
    assert used == len(owners) <= plan.max_tiles == max_tiles(n, experts, rows)
    assert plan.experts[:used].tolist() == owners
    assert plan.order[: used * rows].tolist() == expected


def test_more_choices_than_one_look() -> None:
    _, ids = choices(2100, 3, 2)
    plan = align(ids.contiguous(), 3, 128)
    used = plan.order[: int(plan.tiles) * 128]
    assert used[used < 4200].sort().values.tolist() == list(range(4200))
    assert torch.equal(ids.flatten()[used[used < 4200].long()], ids.flatten().sort().values)


def test_no_memory_is_spent_on_experts_that_cannot_be_chosen() -> None:
    assert max_tiles(8, 128, 16) == 8
    assert max_tiles(4096 * 8, 128, 128) <= 256 + 128


@pytest.mark.parametrize("name", ["plain", *weight_formats()])
def test_tokens_of_every_number(name: str) -> None:
    experts = weights(name, 5, 128, 64 if name == "int4" else 96, None if name != "int4" else 64, torch.float32)
    for tokens in (0, 1, 33):
        x = normal((tokens, 128), torch.float32, tokens).to(DEVICE)
        result, expected = both(name, x, experts, *choices(tokens, 4, 2), "silu")  # the last expert is never chosen
        assert result.shape == expected.shape
        assert distance(result, expected) < tolerance(name)


@pytest.mark.parametrize(("name", "group"), [("int4", 32), ("int4", 64), ("int4", 192), ("int8", 32), ("int8", 96)])
def test_groups(name: str, group: int) -> None:
    experts = weights(name, 2, 192, 192 if group > 32 else 64, group, torch.float32)
    x = normal((5, 192), torch.float32).to(DEVICE)
    result, expected = both(name, x, experts, *choices(5, 2, 2), "gelu")
    assert distance(result, expected) < 2e-6


def test_codes_without_zero_points() -> None:
    gate_up, down = weights("int4", 3, 64, 64, 32, torch.float32)
    experts = tuple(PackedWeight("int4", w.outputs, w.inputs, w.group, w.codes, w.scales) for w in (gate_up, down))
    x = normal((5, 64), torch.float32).to(DEVICE)
    result, expected = both("int4", x, experts, *choices(5, 3, 2), "silu")  # type: ignore[arg-type]
    assert distance(result, expected) < 2e-6


@pytest.mark.parametrize("name", ["plain", "int8", "w8a8", "fp8", "fp8_block"])
def test_widths_that_no_tile_divides(name: str) -> None:
    experts = weights(name, 3, 40, 72, None, torch.float32)
    x = normal((5, 40), torch.float32).to(DEVICE)
    result, expected = both(name, x, experts, *choices(5, 3, 2), "silu")
    assert distance(result, expected) < tolerance(name)


@pytest.mark.parametrize(("rows", "warpgroups"), [(64, True), (128, False)])
@pytest.mark.parametrize("name", ["plain", *weight_formats()])
def test_tiles_of_prompts(name: str, rows: int, warpgroups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_rows_per_tile", lambda choices, experts, wide: rows)
    monkeypatch.setattr(launches, "_warpgroups", lambda device: warpgroups)
    experts = weights(
        name, 2, 128, 160 if name in ("plain", "int4") else 128, 32 if name == "int4" else None, torch.float16
    )
    x = normal((70, 128), torch.float16).to(DEVICE)
    result, expected = both(name, x, experts, *choices(70, 2, 1), "silu")
    assert distance(result, expected) < max(1e-3, tolerance(name))  # hidden values are rounded to fp16


def test_static_scales_of_the_activations() -> None:
    gate_up, down = weights("w8a8", 3, 64, 64, None, torch.float32)
    scales = torch.tensor([0.03, 0.01], device=DEVICE)
    experts = tuple(
        PackedWeight("w8a8", w.outputs, w.inputs, w.group, w.codes, w.scales, input_scale=scale)
        for w, scale in zip((gate_up, down), scales, strict=True)
    )
    x = normal((5, 64), torch.float32).to(DEVICE)
    result, expected = both("w8a8", x, experts, *choices(5, 3, 2), "silu")  # type: ignore[arg-type]
    assert distance(result, expected) < tolerance("w8a8")


def test_nothing_beyond_the_rows_is_read_and_results_repeat() -> None:
    experts = weights("plain", 4, 40, 24, None, torch.float32)
    wide = torch.full((9, 64), NAN, device=DEVICE)
    wide[:, :40] = normal((9, 40), torch.float32).to(DEVICE)
    routed, ids = choices(9, 4, 3)
    first, expected = both("plain", wide[:, :40], experts, routed, ids, "gelu")
    again, _ = both("plain", wide[:, :40], experts, routed, ids, "gelu")
    assert distance(first, expected) < 2e-6
    assert torch.equal(first, again)


def test_a_token_does_not_depend_on_the_others() -> None:
    experts = weights("int4", 4, 64, 32, 32, torch.float32)
    x = normal((20, 64), torch.float32).to(DEVICE)
    routed, ids = choices(20, 4, 2)
    whole, _ = both("int4", x, experts, routed, ids, "silu")
    alone, _ = both("int4", x[7:8], experts, routed[7:8], ids[7:8], "silu")
    assert torch.equal(whole[7:8], alone)


def test_float8_is_refused_where_there_is_none() -> None:
    when = implementations("moe_fp8")["triton"].when
    assert when(Target("cuda", torch.bfloat16, 128, "bf16", (8, 9))) is None
    reason = when(Target("cuda", torch.bfloat16, 128, "bf16", (8, 0)))
    assert reason is not None
    assert "8.9" in reason


def test_tiles_grow_with_the_choices_per_expert() -> None:
    sizes = [launches._rows_per_tile(tokens * 8, 128, False) for tokens in (1, 256, 257, 4096, 8192)]
    assert sizes == [16, 16, 64, 64, 128]
    assert launches._rows_per_tile(10**6, 8, True) == 16
