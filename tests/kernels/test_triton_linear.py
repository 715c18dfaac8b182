"""Every way in which a quantized product can be cut: the same numbers, the same bits again, no row sees another."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels.packed import PackedWeight, QuantizedRows, weight_format
from quire.kernels.reference.rows import dequantize_rows, quantize_rows
from quire.kernels.registry import Target
from quire.kernels.testing import assert_close, cases, device_of, normal
from quire.kernels.tuning import DENSE, Tile

if ("triton", torch.float32) not in cases("linear_int4"):
    pytest.skip("Triton runs on a GPU, or in its interpreter", allow_module_level=True)

from quire.kernels.triton import linear_codes, linear_int4, linear_int8, slices

DEVICE = device_of("triton")
MODULES = {
    "int4": linear_int4,
    "int8": linear_int8,
    "w8a8": linear_codes,
    "fp8": linear_codes,
    "fp8_block": linear_codes,
}
FEW, SLICED, MANY = Tile(16, 64, 128, 1, 4, 3), Tile(16, 128, 128, 2, 4, 3), Tile(64, 64, 128, 3, 4, 3)
WAYS = [(name, tile) for name in MODULES for tile in (FEW, SLICED, MANY)]
WAYS += [("int4", Tile(32, 128, 128, 1, 4, 3)), ("int4", DENSE), ("int8", Tile(32, 128, 32, 2, 4, 3))]


def on_device(value: Any) -> Any:
    tensors = {f.name: t.to(DEVICE) for f in fields(value) if isinstance(t := getattr(value, f.name), Tensor)}
    return replace(value, **tensors)


def prepared(name: str, outputs: int, inputs: int, bias: Tensor | None = None) -> tuple[PackedWeight, Any]:
    weight = weight_format(name).quantize(normal((outputs, inputs), torch.float32) / inputs**0.5, None)
    return weight, MODULES[name].prepare(on_device(weight), None if bias is None else bias.to(DEVICE))


def taken(name: str, weight: PackedWeight, rows: int) -> tuple[Any, Tensor]:
    """(what `multiply` takes, the same numbers in fp64)"""
    x = normal((rows, weight.inputs), torch.float32, 1)
    to = weight_format(name).rows(weight)
    if to is None:
        return x.to(DEVICE), x.double()
    codes = quantize_rows(x, to)
    return on_device(codes), dequantize_rows(codes).double()


def first_rows(x: Any, count: int) -> Any:
    return replace(x, codes=x.codes[:count], scales=x.scales[:count]) if isinstance(x, QuantizedRows) else x[:count]


@pytest.mark.parametrize(("name", "tile"), WAYS)
def test_every_cut_gives_the_product(name: str, tile: Tile) -> None:
    """Tails of rows, outputs and iterations; slices of which the last has less to do, or nothing."""
    bias = normal((130,), torch.float32, 2)
    weight, packed = prepared(name, 130, 512, bias)
    x, wide = taken(name, weight, 19)
    expected = wide @ weight_format(name).dequantize(weight).double().T + bias.double()
    result = MODULES[name].multiply(x, packed, tile)
    assert_close(result.cpu(), expected, torch.float32)
    assert torch.equal(MODULES[name].multiply(x, packed, tile), result)  # the counters are as they were
    assert not packed.arrived.any()


@pytest.mark.parametrize(("name", "tile"), [way for way in WAYS if way[1] in (FEW, SLICED)])
def test_rows_do_not_see_their_batch_mates(name: str, tile: Tile) -> None:
    weight, packed = prepared(name, 48, 256)
    x, _ = taken(name, weight, 18)
    whole = MODULES[name].multiply(x, packed, tile)
    for rows in (1, 16, 17):
        assert torch.equal(MODULES[name].multiply(first_rows(x, rows), packed, tile), whole[:rows])


def test_int4_rows_of_codes_begin_at_aligned_addresses() -> None:
    _, packed = prepared("int4", 30, 128)
    for tensor in (packed.weight.codes, packed.weight.scales, packed.weight.zeros):
        assert tensor.shape[-1] == 32
    _, packed = prepared("int4", 32, 128)
    assert packed.weight.codes.shape == (64, 32)


def test_more_tiles_than_counters_are_not_sliced() -> None:
    tile = Tile(16, 64, 128, 4, 4, 3)
    assert slices.programs(tile, 16, 64 * slices.COUNTERS) == (slices.COUNTERS, 4)
    assert slices.programs(tile, 17, 64 * slices.COUNTERS) == (2 * slices.COUNTERS, 1)


@pytest.mark.parametrize(("capability", "usable"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_fp8_needs_its_tensor_cores(capability: tuple[int, int], usable: bool) -> None:
    target = Target("cuda", torch.bfloat16, 64, "bf16", capability)
    reason = linear_codes.has_fp8(target)
    assert (reason is None) == usable
    assert usable or "8.9" in reason
