"""Caches of every format under the compiled kernels: attention, writes, moves; each instruction set, bits, limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.kernels import Target
from quire.kernels.batch import KVSpec, LayerKV, RaggedBatch, SharedPrefix, allocate_layer
from quire.kernels.cpu.native import library
from quire.kernels.kv_formats import kv_formats
from quire.kernels.reference.rope import rope_table
from quire.kernels.testing import assert_close, grow_tree, make_batch, make_cache, normal, pair

pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))
DTYPES = (torch.float32, torch.bfloat16)
QUANTIZED = ("fp8_e4m3", "int8_per_token_head", "int4_per_token_head")
RAGGED = ([1, 20, 5, 1], [530, 70, 600, 3])


def attend(name: str, batch: RaggedBatch, cache: LayerKV, q: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    implementation = pair("attention", name)[0]
    wanted = {"window": None, "softcap": 0.0, "sinks": None} | options
    plan = implementation.prepare(batch, cache.spec.block_size, wanted["window"])
    return implementation.run(q, cache, plan, q.shape[2] ** -0.5, wanted["softcap"], wanted["sinks"])


def check(batch: RaggedBatch, cache: LayerKV, q: Tensor, **options: object) -> None:
    expected, expected_lse = attend("reference", batch, cache, q, **options)
    assert not expected.isnan().any()
    o, lse = attend("native", batch, cache, q, **options)
    assert_close(o, expected, q.dtype)
    assert_close(lse, expected_lse, q.dtype)


@pytest.mark.usefixtures("level", "two_threads")
@pytest.mark.parametrize("kv_format", kv_formats())
class TestAttention:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("dim", "heads"), [(16, 2), (64, 14), (48, 6)])
    def test_against_the_reference(self, kv_format: str, dtype: torch.dtype, dim: int, heads: int) -> None:
        if reason := library.usable_on_cache(Target("cpu", dtype, dim, kv_format)):
            pytest.skip(reason)
        batch = make_batch(*RAGGED, block_size=16)
        grow_tree(batch, 2, [-1, -1, 0, 1])
        cache = make_cache(batch, KVSpec(16, 2, dim, kv_format))
        q = normal((batch.num_tokens, heads, dim), dtype)
        check(batch, cache, q)
        check(batch, cache, q, window=70, softcap=4.0, sinks=normal((heads,), torch.float32))

    def test_wide_heads_and_odd_blocks(self, kv_format: str) -> None:
        batch = make_batch([1, 9], [129, 60], block_size=24)
        cache = make_cache(batch, KVSpec(24, 1, 256, kv_format))
        check(batch, cache, normal((10, 3, 256), torch.bfloat16))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bits_depend_on_the_row_alone(self, kv_format: str, dtype: torch.dtype) -> None:
        """Not on batch-mates, on the cut into chunks, on threads, or on a prefix that is read for several."""
        q_lens, contexts = [1, 5, 20, 1], [600, 600, 90, 1100]
        batch = make_batch(q_lens, contexts, block_size=16)
        batch.block_table[1, :32] = batch.block_table[0, :32]
        cache = make_cache(batch, KVSpec(16, 2, 32, kv_format))
        q = normal((batch.num_tokens, 6, 32), dtype)
        together = attend("native", batch, cache, q)
        shared = attend("native", replace(batch, shared=(SharedPrefix((0, 1), 32),)), cache, q)
        assert torch.equal(together[0], shared[0])
        assert torch.equal(together[1], shared[1])
        torch.set_num_threads(1)
        for s, (rows, context) in enumerate(zip(q_lens, contexts, strict=True)):
            for first in range(0, rows, 3):
                count = min(3, rows - first)
                piece = make_batch([count], [context + first], block_size=16)
                piece.block_table = batch.block_table[s : s + 1].contiguous()
                mine = slice(int(batch.cu_q[s]) + first, int(batch.cu_q[s]) + first + count)
                o, lse = attend("native", piece, cache, q[mine])
                assert torch.equal(o, together[0][mine])
                assert torch.equal(lse, together[1][mine])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_stays_in_its_row(self, kv_format: str, dtype: torch.dtype) -> None:
        batch = make_batch([4, 1], [30, 100], block_size=16)
        cache = make_cache(batch, KVSpec(16, 2, 32, kv_format))
        q = normal((5, 4, 32), dtype)
        q[2, 1, 7] = float("nan")
        o, lse = attend("native", batch, cache, q)
        assert o[2, 1].isnan().all()
        assert o.isnan().sum() == 32
        assert lse.isnan().sum() == 1
        assert lse[2, 1].isnan()


@pytest.mark.usefixtures("two_threads")
class TestStep:
    """The list of tasks is made once for the layers of a step, and anew for whatever differs."""

    def test_layers_of_other_shapes_in_turn(self) -> None:
        batch = make_batch([1, 20], [700, 40], block_size=16)
        plan = pair("attention", "native")[0].prepare(batch, 16, None)
        for kv_heads, heads, dim in ((2, 6, 32), (1, 6, 32), (2, 4, 32), (2, 6, 64), (2, 6, 32)):
            cache = make_cache(batch, KVSpec(16, kv_heads, dim, "bf16"))
            q = normal((21, heads, dim), torch.bfloat16)
            o, _ = pair("attention", "native")[0].run(q, cache, plan, dim**-0.5, 0.0, None)
            assert_close(o, attend("reference", batch, cache, q)[0], torch.bfloat16)

    def test_two_steps_in_turn(self) -> None:
        batches = [make_batch([1, 3], [700, 40], block_size=16), make_batch([2, 1, 1], [30, 1300, 5], block_size=16)]
        caches = [make_cache(batch, KVSpec(16, 2, 32, "fp32")) for batch in batches]
        plans = [pair("attention", "native")[0].prepare(b, 16, window) for window in (None, 50) for b in batches]
        q = normal((4, 6, 32), torch.float32)
        for turn in (0, 1, 0, 2, 3, 2, 1, 3):
            batch, cache = batches[turn % 2], caches[turn % 2]
            o, _ = pair("attention", "native")[0].run(q, cache, plans[turn], 32**-0.5, 0.0, None)
            expected = attend("reference", batch, cache, q, window=50 if turn > 1 else None)[0]
            assert_close(o, expected, torch.float32)


def some_cache(kv_format: str, dim: int, heads: int, seed: int = 0) -> LayerKV:
    """Every slot of six blocks of four is taken."""
    cache = allocate_layer(KVSpec(4, heads, dim, kv_format), 6, "cpu")
    if cache.spec.coding.scale == "static":
        cache.k_scale, cache.v_scale = torch.linspace(0.01, 2.0, heads), torch.linspace(1.5, 0.25, heads)
    k, v = normal((2, 24, heads, dim), torch.float32, seed)
    pair("kv_write", "reference")[1].run(k, v, cache, torch.arange(24))
    return cache


def copy_of(cache: LayerKV) -> LayerKV:
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    return LayerKV(cache.spec, *(None if x is None else x.clone() for x in tensors))


def assert_same(cache: LayerKV, expected: LayerKV) -> None:
    for ours, theirs in zip(cache.per_slot, expected.per_slot, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.usefixtures("level", "two_threads")
@pytest.mark.parametrize("kv_format", kv_formats())
class TestWrites:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("dim", "heads"), [(8, 2), (64, 3), (256, 1)])
    def test_codes_are_those_of_the_reference(self, kv_format: str, dtype: torch.dtype, dim: int, heads: int) -> None:
        """Values of all sizes, zeros, ones too large, ties of the format; other slots stay as they are."""
        cache = some_cache(kv_format, dim, heads)
        expected = copy_of(cache)
        joined = normal((9, 3 * heads, dim), torch.float32, 3) * torch.logspace(-9, 5, 9)[:, None, None]
        joined[4], joined[5, :, 1], joined[6] = 0.0, 1e6, torch.arange(dim) * 0.125 - 3
        joined = joined.to(dtype)
        k, v = joined[:, heads : 2 * heads], joined[:, 2 * heads :]
        slots = torch.randperm(24, generator=torch.Generator().manual_seed(4))[:9]
        ours, reference = pair("kv_write", "native")
        ours.run(k, v, cache, slots)
        reference.run(k, v, expected, slots)
        assert_same(cache, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", [0, 1, 5, 17])
    def test_rotated_keys_are_written_as_if_rotated_alone(self, kv_format: str, dtype: torch.dtype, count: int) -> None:
        table, positions = rope_table(32, 40, 100.0), torch.arange(count) * 2
        slots = torch.randperm(24, generator=torch.Generator().manual_seed(4))[:count]
        for interleaved in (False, True):
            q, k, v = normal((count, 9, 64), dtype, 3).split([5, 2, 2], dim=1)
            cache = some_cache(kv_format, 64, 2)
            expected = copy_of(cache)
            turned = pair("rope", "native")[0].run(q.clone(), k.clone(), positions, table, interleaved)
            pair("kv_write", "native")[0].run(turned[1], v, expected, slots)
            before = v.clone()
            out = pair("rope_kv_write", "native")[0].run(q, k, v, positions, table, interleaved, cache, slots)
            assert torch.equal(out, turned[0])
            assert torch.equal(v, before)
            assert_same(cache, expected)

    def test_nan_makes_nan(self, kv_format: str) -> None:
        cache = some_cache(kv_format, 32, 2)
        k, v = normal((3, 2, 32), torch.float32), normal((3, 2, 32), torch.float32, 1)
        k[1, 0, 5] = v[1, 1, 20] = float("nan")
        pair("kv_write", "native")[0].run(k, v, cache, torch.tensor([3, 4, 5]))
        for pages, scale, bad in ((cache.k, cache.k_scale, (1, 0)), (cache.v, cache.v_scale, (1, 1))):
            scale = scale if cache.spec.coding.scale == "static" or scale is None else scale.flatten(0, 1)[3:6]
            decoded = cache.spec.coding.decode(pages.flatten(0, 1)[3:6], scale)
            assert decoded[bad].isnan().any()
            decoded[bad] = 0.0
            assert not decoded.isnan().any()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kv_format", kv_formats())
def test_moves(kv_format: str) -> None:
    """Chains and swaps read what was there before any of them."""
    moves = {"kv_compact": ([9, 3, 4, 9, 20], [3, 4, 9, 17, 20]), "kv_copy_blocks": ([1, 2, 3, 3], [2, 1, 4, 0])}
    for op, ends in moves.items():
        cache = some_cache(kv_format, 32, 2)
        expected = copy_of(cache)
        source, target = (torch.tensor(x) for x in ends)
        ours, reference = pair(op, "native")
        ours.run(cache, source, target)
        reference.run(expected, source, target)
        assert_same(cache, expected)
        ours.run(cache, source[:0], target[:0])
        assert_same(cache, expected)


class TestLimits:
    @pytest.mark.parametrize("op", ["kv_compact", "kv_copy_blocks"])
    @pytest.mark.parametrize(("source", "target"), [(24, 0), (-1, 0), (0, 24), (0, -1)])
    def test_moves(self, op: str, source: int, target: int) -> None:
        cache = some_cache("int8_per_token_head", 32, 2)
        before = copy_of(cache)
        with pytest.raises(IndexError, match="outside of the cache"):
            pair(op, "native")[0].run(cache, torch.tensor([1, source]), torch.tensor([2, target]))
        assert_same(cache, before)

    @pytest.mark.parametrize(("position", "slot"), [(40, 1), (-1, 1), (1, 24), (1, -1)])
    def test_positions_and_slots(self, position: int, slot: int) -> None:
        cache, table = some_cache("int4_per_token_head", 32, 2), rope_table(32, 40, 100.0)
        q, k, v = normal((2, 6, 32), torch.bfloat16).split([2, 2, 2], dim=1)
        with pytest.raises(IndexError, match="outside of"):
            pair("rope_kv_write", "native")[0].run(
                q, k, v, torch.tensor([0, position]), table, False, cache, torch.tensor([2, slot])
            )


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("size", [1, 4, 16, 256])
def test_rotation_of_plain_rows_and_of_heads(dtype: torch.dtype, size: int) -> None:
    ours, reference = pair("hadamard", "native")
    for x in (normal((7, size), dtype), normal((3, 9, size), dtype)[:, 2:5], normal((2, 2, 2, size), dtype)):
        assert torch.equal(ours.run(x), reference.run(x))


@pytest.mark.parametrize(
    ("dim", "kv_format", "reason"),
    [(48, "int4_per_token_head", "power of two"), (40, "fp16", "multiple of 16"), (64, "int3", "holds int3")],
)
def test_refusals(dim: int, kv_format: str, reason: str) -> None:
    assert reason in str(library.usable_on_cache(Target("cpu", torch.bfloat16, dim, kv_format)))


@pytest.mark.parametrize("kv_format", QUANTIZED)
def test_no_op_on_the_cache_is_left_to_others(kv_format: str) -> None:
    target = Target("cpu", torch.bfloat16, 64, kv_format)
    for op in ("attention", "kv_write", "rope_kv_write", "kv_compact", "kv_copy_blocks"):
        assert pair(op, "native")[0].when(target) is None
