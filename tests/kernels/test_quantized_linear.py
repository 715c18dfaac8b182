"""Weight formats (codes, errors, joins, refusals) and every product with them against the dequantized weight."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kernels.packed import (
    PackedWeight,
    first_inputs,
    join_rows,
    select_rows,
    stack_experts,
    weight_format,
    weight_formats,
)
from quire.kernels.reference.int4 import pack_int4, split_block, unpack_int4
from quire.kernels.reference.low_rank import LowRank
from quire.kernels.reference.rows import dequantize_rows, quantize_rows
from quire.kernels.testing import NAN, assert_close, cases, device_of, normal, pair

FORMATS = ("int4", "int8", "w8a8", "fp8", "fp8_block")
PLAIN = ("int4", "int8")  # those that take activations as they are
CODES = ("w8a8", "fp8", "fp8_block")  # those that take them in codes
ROWS = (0, 1, 2, 5, 17, 33)


def make(name: str, outputs: int, inputs: int, group: int | None = None, seed: int = 0) -> PackedWeight:
    return weight_format(name).quantize(normal((outputs, inputs), torch.float32, seed) / inputs**0.5, group)


def symmetric(weight: PackedWeight) -> PackedWeight:
    return replace(weight, zeros=None)


def at(weight: PackedWeight, device: str) -> PackedWeight:
    tensors = {f.name: t.to(device) for f in fields(weight) if isinstance(t := getattr(weight, f.name), Tensor)}
    return replace(weight, **tensors)


def run(op: str, name: str, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """A product by the named implementation, on its own device."""
    ours, _ = pair(op, name)
    device = device_of(name)
    packed = ours.prepare(at(weight, device), None if bias is None else bias.to(device))
    return ours.run(x.to(device), packed).cpu()


def exact(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """What a product is to be, in fp64: on the activations' codes where the format has such."""
    spec = weight_format(weight.format)
    to = spec.rows(weight)
    rows = x if to is None else dequantize_rows(quantize_rows(x, to))
    out = rows.double() @ spec.dequantize(weight).double().T
    return out if bias is None else out + bias.double()


def test_every_format_is_tested() -> None:
    assert set(weight_formats()) == set(FORMATS)


@given(
    outputs=st.integers(1, 9),
    blocks=st.integers(1, 3),
    group=st.sampled_from([32, 64, 96, 128, 256]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None)
def test_int4_codes_survive_packing(outputs: int, blocks: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outputs, blocks * group), generator=generator, dtype=torch.uint8)
    packed = pack_int4(codes, group)
    assert packed.shape == (blocks * group // 2, outputs)
    assert torch.equal(unpack_int4(packed, group), codes)


@pytest.mark.parametrize(("group", "block"), [(32, 32), (96, 32), (64, 64), (192, 64), (128, 128), (512, 128)])
def test_int4_halves_of_a_block_share_bytes(group: int, block: int) -> None:
    assert split_block(group) == block
    codes = (torch.arange(2 * group) % 16).to(torch.uint8).view(1, -1)
    packed = pack_int4(codes, group)[:, 0]
    for byte in (0, 1, block // 2 - 1, block // 2, group - 1):
        start, r = byte // (block // 2) * block, byte % (block // 2)
        assert packed[byte].item() == codes[0, start + r] + 16 * codes[0, start + block // 2 + r]


@pytest.mark.parametrize(
    ("name", "group", "gaussian", "heavy"),
    [
        ("int8", 0, 0.0083, 0.0174),
        ("w8a8", None, 0.0083, 0.0174),
        ("int4", 128, 0.100, 0.133),
        ("int4", 32, 0.078, 0.090),
        ("fp8", None, 0.0264, 0.026),
        ("fp8_block", None, 0.0264, 0.026),
    ],
)
def test_rounding_errors(name: str, group: int | None, gaussian: float, heavy: float) -> None:
    """‖Q(W) - W‖ / ‖W‖ on Gaussian and Student-t(5) weights; int4 tries ranges, so it may only be better."""
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(6, 512, 2048, generator=generator)
    weights = {gaussian: normals[0], heavy: normals[0] / (normals[1:].square().mean(0)).sqrt()}
    for expected, weight in weights.items():
        spec = weight_format(name)
        error = ((spec.dequantize(spec.quantize(weight, group)) - weight).norm() / weight.norm()).item()
        assert error < expected * 1.05
        assert error > expected * (0.8 if name == "int4" else 0.95)


@pytest.mark.parametrize("name", FORMATS)
def test_joined_rows_are_the_parts(name: str) -> None:
    parts = [make(name, outputs, 256, seed=outputs) for outputs in (48, 16, 32)]
    read = weight_format(name).dequantize
    assert torch.equal(read(join_rows(parts)), torch.cat([read(part) for part in parts]))
    assert join_rows(parts[:1]) is parts[0]
    scaled = [
        replace(part, input_scale=torch.tensor(scale)) for part, scale in zip(parts, (1.0, 3.0, 2.0), strict=True)
    ]
    assert join_rows(scaled).input_scale == 3.0
    with pytest.raises(ValueError, match="some have none"):
        join_rows([scaled[0], parts[1]])
    equal = [make(name, 32, 256, seed=seed) for seed in range(3)]
    assert torch.equal(read(stack_experts(equal)), torch.stack([read(part) for part in equal]))


@pytest.mark.parametrize(
    ("name", "inputs", "group", "count"),
    [
        ("int4", 384, 128, 256),
        ("int4", 384, 32, 96),
        ("int4", 512, 0, 256),
        ("int8", 384, 64, 128),
        ("int8", 384, 0, 100),
        ("w8a8", 384, 0, 100),
        ("fp8", 384, 0, 100),
        ("fp8_block", 384, None, 200),
        ("fp8_block", 128, None, 64),
    ],
)
def test_slices_are_those_of_the_values(name: str, inputs: int, group: int | None, count: int) -> None:
    weight, read = make(name, 48, inputs, group), weight_format(name).dequantize
    assert torch.equal(read(first_inputs(weight, count)), read(weight)[:, :count])
    outputs = torch.tensor([0, 5, 6, 47])
    assert torch.equal(read(select_rows(weight, outputs)), read(weight)[outputs])


@pytest.mark.parametrize(("name", "group", "count"), [("int4", 128, 192), ("int4", 0, 160), ("int8", 64, 96)])
def test_slices_that_end_within_a_group_are_refused(name: str, group: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"its first {count} inputs end in the middle of a group of {group or 384}"):
        first_inputs(make(name, 8, 384, group), count)
    ordered = replace(make(name, 8, 384, group), order=torch.arange(384))
    with pytest.raises(ValueError, match="act-order"):
        first_inputs(ordered, 128)
    assert select_rows(ordered, torch.tensor([3])).order is ordered.order


def test_parts_that_differ_are_not_joined() -> None:
    part, order = make("int4", 16, 128, 32), torch.arange(127, -1, -1)
    for other in (
        make("int8", 16, 128, 32),
        make("int4", 16, 128, 64),
        make("int4", 16, 256, 32),
        symmetric(part),
        replace(part, order=order),
    ):
        with pytest.raises(ValueError, match="cannot be joined"):
            join_rows([part, other])
    with pytest.raises(ValueError, match="one shape"):
        stack_experts([part, make("int4", 32, 128, 32)])


@pytest.mark.parametrize(
    ("name", "shape", "remedy"),
    [
        ("int4", (8, 320, 128), "take a group of 64 or 32"),
        ("int4", (8, 320, 80), "take 64 or 32, or int8"),
        ("int4", (8, 100, 0), "or int8"),
        ("int8", (8, 320, 128), "group 0"),
        ("int8", (8, 320, 80), "32, 64, 128"),
        ("w8a8", (8, 256, 128), "int8 takes groups"),
        ("fp8", (8, 256, 128), "fp8_block"),
        ("fp8_block", (8, 256, 64), "128 x 128"),
    ],
)
def test_what_cannot_be_stored_names_what_can(name: str, shape: tuple[int, int, int], remedy: str) -> None:
    assert remedy in (weight_format(name).refuses(*shape) or "")


@pytest.mark.parametrize(
    ("name", "group"), [("int4", 32), ("int4", 0), ("int8", 0), ("int8", 64), ("w8a8", 0), ("fp8", 0)]
)
def test_what_can_be_stored_is_not_refused(name: str, group: int) -> None:
    assert weight_format(name).refuses(7, 320, group) is None


def formats_and_cases(names: tuple[str, ...]) -> list[tuple[str, str, torch.dtype]]:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return [(name, *case) for name in names for case in cases(f"linear_{name}", dtypes)]


@pytest.mark.parametrize(("fmt", "name", "dtype"), formats_and_cases(FORMATS))
def test_product(fmt: str, name: str, dtype: torch.dtype) -> None:
    """Ragged rows, tails of outputs and inputs, with and without bias."""
    shapes = [(72, 256, None), (131, 320, 32 if fmt in PLAIN else None)] + ([(33, 203, None)] if fmt in CODES else [])
    for i, (outputs, inputs, group) in enumerate(shapes):
        weight = make(fmt, outputs, inputs, group)
        bias = normal((outputs,), dtype, 1) if i % 2 else None
        for rows in ROWS[i % 2 :: 2] if name == "triton" else ROWS:
            x = normal((rows, inputs), dtype, 2)
            result = run(f"linear_{fmt}", name, x, weight, bias)
            assert result.shape == (rows, outputs)
            assert result.dtype == dtype
            assert_close(result, exact(x, weight, bias), dtype)


@pytest.mark.parametrize(("fmt", "name", "dtype"), [c for c in formats_and_cases(PLAIN) if c[2] == torch.float32])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_groups(fmt: str, name: str, dtype: torch.dtype, group: int) -> None:
    weight, x = make(fmt, 40, 384, group), normal((3, 384), dtype, 1)
    for each in (weight, symmetric(weight)):
        assert_close(run(f"linear_{fmt}", name, x, each), exact(x, each), dtype)


@pytest.mark.parametrize(("fmt", "name", "dtype"), [c for c in formats_and_cases(FORMATS) if c[2] == torch.float32])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_width(fmt: str, name: str, dtype: torch.dtype, scales: torch.dtype) -> None:
    weight, x = make(fmt, 37, 256), normal((3, 256), dtype, 1)
    weight = replace(weight, scales=weight.scales.to(scales))
    assert_close(run(f"linear_{fmt}", name, x, weight), exact(x, weight), dtype)


@pytest.mark.parametrize(("fmt", "name", "dtype"), [c for c in formats_and_cases(PLAIN) if c[2] == torch.float32])
def test_columns_in_another_order(fmt: str, name: str, dtype: torch.dtype) -> None:
    """Column j of the codes belongs to input order[j]."""
    plain, order = make(fmt, 24, 128, 32), torch.randperm(128, generator=torch.Generator().manual_seed(3))
    weight, x = replace(plain, order=order), normal((5, 128), dtype, 1)
    read = weight_format(fmt).dequantize
    assert torch.equal(read(weight)[:, order], read(plain))
    assert_close(run(f"linear_{fmt}", name, x, weight), x.double() @ read(weight).double().T, dtype)


@pytest.mark.parametrize(("fmt", "name", "dtype"), [c for c in formats_and_cases(FORMATS) if c[2] == torch.float32])
def test_groups_and_rows_of_zeros(fmt: str, name: str, dtype: torch.dtype) -> None:
    weight = normal((48, 256), torch.float32)
    weight[:, :128] = 0
    weight[7] = 0
    packed, x = weight_format(fmt).quantize(weight, None), normal((4, 256), dtype, 1)
    x[2] = 0
    result = run(f"linear_{fmt}", name, x, packed)
    assert_close(result, exact(x, packed), dtype)
    assert not result[2].any()
    assert not result[:, 7].any()


@pytest.mark.parametrize(("fmt", "name", "dtype"), [c for c in formats_and_cases(FORMATS) if c[2] == torch.float32])
def test_strided_rows(fmt: str, name: str, dtype: torch.dtype) -> None:
    """x is a slice of a wider tensor; what is beside it is never read."""
    wide = torch.full((6, 384), NAN, dtype=dtype)
    wide[:5, 16:272] = normal((5, 256), dtype, 1)
    weight, x = make(fmt, 48, 256), wide[:5, 16:272]
    assert_close(run(f"linear_{fmt}", name, x, weight), exact(x.contiguous(), weight), dtype)


@pytest.mark.parametrize(("name", "dtype"), cases("linear_w8a8", (torch.float32,)))
def test_integers_are_exact(name: str, dtype: torch.dtype) -> None:
    """Sums beyond 2²⁴, where fp32 sums would round."""
    codes = torch.full((16, 4096), 127, dtype=torch.int8)
    codes[:, ::3] = 126
    weight = replace(make("w8a8", 16, 4096), codes=codes, scales=torch.ones(1, 16))
    x = torch.full((2, 4096), 127.0)
    x[1, ::5] = 125
    total = (x.double() @ codes.double().T).float()
    assert total.min() > 2**24
    assert torch.equal(run("linear_w8a8", name, x, weight), total)


@pytest.mark.parametrize("fmt", CODES)
def test_rows_in_codes_are_taken_as_they_are(fmt: str) -> None:
    spec, x = weight_format(fmt), normal((5, 256), torch.float32, 1)
    for weight in (make(fmt, 40, 256), replace(make(fmt, 40, 256), input_scale=torch.tensor(0.02))):
        to = spec.rows(weight)
        assert to is not None
        rows = quantize_rows(x, to)
        for name, _ in cases(f"linear_{fmt}", (torch.float32,)):
            ours, _ = pair(f"linear_{fmt}", name)
            device = device_of(name)
            packed = ours.prepare(at(weight, device), None)
            moved = replace(rows, codes=rows.codes.to(device), scales=rows.scales.to(device))
            assert_close(ours.run(moved, packed).cpu(), exact(x, weight), torch.float32)
            assert_close(ours.run(x.to(device), packed).cpu(), exact(x, weight), torch.float16)


@pytest.mark.parametrize(("name", "dtype"), cases("low_rank", (torch.float32, torch.float16, torch.bfloat16)))
@pytest.mark.parametrize(("tokens", "rank", "pairs"), [(0, 8, 1), (1, 8, 1), (17, 5, 3), (33, 16, 4)])
def test_low_rank(name: str, dtype: torch.dtype, tokens: int, rank: int, pairs: int) -> None:
    ours, _ = pair("low_rank", name)
    device = device_of(name)
    inputs, outputs = 520, 130
    b = (normal((pairs, rank, inputs), torch.float32) / inputs**0.5).to(dtype)
    a = (normal((pairs, outputs, rank), torch.float32, 1) / rank**0.5).to(dtype)
    x, y = normal((tokens, inputs), dtype, 2), normal((tokens, outputs), dtype, 3)
    draw = torch.Generator().manual_seed(4)
    for index in (torch.randint(-1, pairs, (tokens,), generator=draw), torch.full((tokens,), -1)):
        expected = y.double()
        for t, pair_index in enumerate(index.tolist()):
            if pair_index >= 0:
                expected[t] += a[pair_index].double() @ (b[pair_index].double() @ x[t].double())
        factors = LowRank(b.to(device), a.to(device))
        result = ours.run(y.clone().to(device), x.to(device), factors, index.to(device)).cpu()
        assert result.dtype == dtype
        assert_close(result, expected, dtype)
        assert torch.equal(result[index < 0], y[index < 0])
