"""Writing, compacting and copying keys and values: the slots named change, no other does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import Target, implementations
from quire.kernels.batch import KVSpec, LayerKV, allocate_layer
from quire.kernels.kv_formats import kv_format as named
from quire.kernels.reference.hadamard import hadamard
from quire.kernels.reference.rope import rope_table
from quire.kernels.testing import FORMATS, assert_close, cases, device_of, normal, pair

BLOCKS, SIZE, HEADS, DIM = 5, 4, 2, 8
SLOTS = BLOCKS * SIZE
QUANTIZED = ("fp8_e4m3", "int8_per_token_head", "int4_per_token_head")


def filled(dtype: torch.dtype) -> LayerKV:
    spec = KVSpec(SIZE, HEADS, DIM, FORMATS[dtype])
    shape = (BLOCKS, SIZE, HEADS, DIM)
    return LayerKV(spec, normal(shape, dtype, 1), normal(shape, dtype, 2))


def slots_of(cache: LayerKV) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.k.flatten(0, 1).clone(), cache.v.flatten(0, 1).clone()


@pytest.mark.parametrize(("name", "dtype"), cases("kv_write"))
@pytest.mark.parametrize("count", [0, 1, 7])
def test_write(name: str, dtype: torch.dtype, count: int) -> None:
    cache = filled(dtype)
    keys, values = slots_of(cache)
    joined = normal((count, 3 * HEADS, DIM), dtype, 3)  # q, k and v of one projection
    k, v = joined[:, HEADS : 2 * HEADS], joined[:, 2 * HEADS :]
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(4))[:count]
    pair("kv_write", name)[0].run(k, v, cache, slots)
    keys[slots], values[slots] = k, v
    assert torch.equal(slots_of(cache)[0], keys)
    assert torch.equal(slots_of(cache)[1], values)


@pytest.mark.parametrize(("name", "dtype"), cases("kv_write"))
def test_padding_may_repeat_the_null_slot(name: str, dtype: torch.dtype) -> None:
    cache = filled(dtype)
    keys, _ = slots_of(cache)
    k = normal((4, HEADS, DIM), dtype, 3)
    pair("kv_write", name)[0].run(k, k, cache, torch.tensor([9, 0, 0, 0]))
    keys[9] = k[0]
    assert torch.equal(slots_of(cache)[0][1:], keys[1:])


@pytest.mark.parametrize(("name", "dtype"), cases("kv_compact", (torch.float32,)))
@given(data=st.data())
@settings(deadline=None)
def test_compact_reads_all_before_it_writes(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    slots = st.lists(st.integers(0, SLOTS - 1), max_size=8, unique=True)
    dst = data.draw(slots)
    src = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=len(dst), max_size=len(dst)))
    cache = filled(dtype)
    keys, values = slots_of(cache)
    pair("kv_compact", name)[0].run(cache, torch.tensor(src, dtype=torch.int64), torch.tensor(dst, dtype=torch.int64))
    expected_keys, expected_values = keys.clone(), values.clone()
    for s, d in zip(src, dst, strict=True):
        expected_keys[d], expected_values[d] = keys[s], values[s]
    assert torch.equal(slots_of(cache)[0], expected_keys)
    assert torch.equal(slots_of(cache)[1], expected_values)


@pytest.mark.parametrize(("name", "dtype"), cases("kv_copy_blocks"))
def test_copy_blocks(name: str, dtype: torch.dtype) -> None:
    cache = filled(dtype)
    keys, values = cache.k.clone(), cache.v.clone()
    pair("kv_copy_blocks", name)[0].run(cache, torch.tensor([1, 1]), torch.tensor([3, 4]))
    keys[3] = keys[4] = keys[1]
    values[3] = values[4] = values[1]
    assert torch.equal(cache.k, keys)
    assert torch.equal(cache.v, values)


def quantized_cases(op_name: str) -> list[tuple[str, str]]:
    """(implementation, format) for every implementation that this machine can run on quantized caches."""
    return [
        (name, kv_format)
        for name, implementation in implementations(op_name).items()
        for kv_format in QUANTIZED
        if implementation.when(Target(device_of(name), torch.float32, 64, kv_format)) is None
    ]


def quantized(kv_format: str, head_dim: int = DIM, heads: int = HEADS) -> LayerKV:
    """A cache in which every slot is taken."""
    cache = allocate_layer(KVSpec(SIZE, heads, head_dim, kv_format), BLOCKS, "cpu")
    if cache.spec.coding.scale == "static":
        cache.k_scale, cache.v_scale = torch.linspace(0.01, 2.0, heads), torch.linspace(1.5, 0.25, heads)
    everything = normal((2, SLOTS, heads, head_dim), torch.float32, 6)
    pair("kv_write", "reference")[1].run(*everything, cache, torch.arange(SLOTS))
    return cache


def copy_of(cache: LayerKV) -> LayerKV:
    return LayerKV(
        cache.spec, *(None if x is None else x.clone() for x in (cache.k, cache.v, cache.k_scale, cache.v_scale))
    )


def assert_same(cache: LayerKV, expected: LayerKV) -> None:
    """Every byte of every tensor that has slots."""
    for ours, theirs in zip(cache.per_slot, expected.per_slot, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize(("name", "kv_format"), quantized_cases("kv_write"))
@pytest.mark.parametrize(("head_dim", "heads"), [(8, 2), (64, 3), (128, 1)])
def test_codes_equal_those_of_the_reference(name: str, kv_format: str, head_dim: int, heads: int) -> None:
    """To the last bit, for values of all sizes, zeros and ones too large among them; other slots stay as they are."""
    cache = quantized(kv_format, head_dim, heads)
    expected = copy_of(cache)
    joined = normal((9, 3 * heads, head_dim), torch.float32, 3) * torch.logspace(-6, 5, 9)[:, None, None]
    joined[4], joined[5, :, 1] = 0.0, 1e4
    k, v = joined[:, heads : 2 * heads], joined[:, 2 * heads :]
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(4))[:9]
    ours, reference = pair("kv_write", name)
    ours.run(k, v, cache, slots)
    reference.run(k, v, expected, slots)
    assert_same(cache, expected)


@pytest.mark.parametrize(("name", "kv_format"), quantized_cases("kv_compact"))
def test_compact_moves_the_scales_too(name: str, kv_format: str) -> None:
    cache = quantized(kv_format)
    before, expected = copy_of(cache), copy_of(cache)
    src, dst = [9, 3, 4, 9], [3, 4, 5, 17]
    pair("kv_compact", name)[0].run(cache, torch.tensor(src), torch.tensor(dst))
    for tensor, old in zip(expected.per_slot, before.per_slot, strict=True):
        for s, d in zip(src, dst, strict=True):
            tensor.flatten(0, 1)[d] = old.flatten(0, 1)[s]
    assert_same(cache, expected)


@pytest.mark.parametrize(("name", "kv_format"), quantized_cases("kv_copy_blocks"))
def test_copied_blocks_have_their_scales(name: str, kv_format: str) -> None:
    """A chain of copies, and a swap, read what was there before any of them."""
    cache = quantized(kv_format)
    before, expected = copy_of(cache), copy_of(cache)
    pair("kv_copy_blocks", name)[0].run(cache, torch.tensor([1, 2, 3, 3]), torch.tensor([2, 1, 4, 0]))
    for tensor, old in zip(expected.per_slot, before.per_slot, strict=True):
        tensor[2], tensor[1], tensor[4], tensor[0] = old[1], old[2], old[3], old[3]
    assert_same(cache, expected)


@pytest.mark.parametrize(
    ("kv_format", "gaussian", "outliers"),
    [
        ("bf16", 0.0017, 0.0017),
        ("fp8_e4m3", 0.0265, 0.0265),
        ("int8_per_token_head", 0.0065, 0.0175),
        ("int4_per_token_head", 0.109, 0.093),
    ],
)
def test_what_a_round_trip_costs(kv_format: str, gaussian: float, outliers: float) -> None:
    """The relative error of stored keys, without and with four entries ten times as large as the others."""
    spec = KVSpec(512, 1, 128, kv_format)
    keys = normal((1, 512, 1, 128), torch.float32, 1)
    loud = keys.clone()
    loud[..., [5, 17, 69, 81]] *= 10
    for x, expected in ((keys, gaussian), (loud, outliers)):
        cache = allocate_layer(spec, 1, "cpu")
        pair("kv_write", "reference")[1].run(x[0], x[0], cache, torch.arange(512))
        stored = spec.coding.decode(cache.k, cache.k_scale)
        turned = hadamard(x) if spec.coding.rotates_keys else x
        assert ((stored - turned).norm() / turned.norm()).item() == pytest.approx(expected, rel=0.08)


def test_outliers_without_the_rotation() -> None:
    """The twin of the above: four bits on keys that were not turned lose a third of them."""
    coding = named("int4_per_token_head")
    keys = normal((512, 128), torch.float32, 1)
    keys[:, [5, 17, 69, 81]] *= 10
    stored = coding.decode(*coding.encode(keys, None))
    assert (stored - keys).norm() > 0.25 * keys.norm()


@pytest.mark.parametrize(("name", "dtype"), cases("hadamard"))
@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_rotation(name: str, dtype: torch.dtype, size: int) -> None:
    x = normal((3, 7, size), dtype, 2)[:, 1:6]
    ours, reference = pair("hadamard", name)
    assert_close(ours.run(x), reference.run(x), dtype)
    assert_close(ours.run(ours.run(x)), x, dtype)
    assert ours.run(x[:0]).shape == (0, 5, size)
    with pytest.raises(ValueError, match="the last dimension is 12"):
        ours.run(torch.zeros(2, 12))


@pytest.mark.parametrize(
    ("name", "kv_format"),
    [*((name, "fp32") for name, _ in cases("rope_kv_write", (torch.float32,))), *quantized_cases("rope_kv_write")],
)
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(16, False), (16, True), (6, False), (6, True)])
def test_rotated_and_written_at_once(name: str, kv_format: str, rotary_dim: int, interleaved: bool) -> None:
    table = rope_table(rotary_dim, 40, 100.0)
    joined = normal((6, 9, 16), torch.float32, 3)  # 5 query heads, 2 of keys, 2 of values
    positions, slots = torch.tensor([0, 1, 39, 5, 6, 7]), torch.tensor([4, 0, 19, 7, 8, 6])
    results = []
    for implementation in pair("rope_kv_write", name):
        q, k, v = joined.clone().split([5, 2, 2], dim=1)
        cache = quantized(kv_format, 16)
        results.append((implementation.run(q, k, v, positions, table, interleaved, cache, slots), cache))
    (turned, cache), (expected, expected_cache) = results
    assert_close(turned, expected, torch.float32)
    for ours, theirs in zip(cache.per_slot, expected_cache.per_slot, strict=True):
        if ours.dtype.is_floating_point:
            assert_close(ours.float(), theirs.float(), torch.float32)
        else:  # rotations that differ in the last bit may differ by a code
            assert ((ours.int() - theirs.int()) != 0).float().mean() < 0.01
