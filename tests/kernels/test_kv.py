"""Writing, compacting and copying keys and values: the slots named change, no other does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels.batch import KVSpec, LayerKV
from quire.kernels.testing import FORMATS, cases, normal, pair

BLOCKS, SIZE, HEADS, DIM = 5, 4, 2, 8
SLOTS = BLOCKS * SIZE


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
