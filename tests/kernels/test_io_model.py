"""Bytes that attention over few rows moves: the model by hand, and the kernel's loads counted in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from quire.kernels import implementations
from quire.kernels.batch import KVSpec
from quire.kernels.io_model import compulsory, launched, pages_of, visible_keys
from quire.kernels.shadow import traffic
from quire.kernels.testing import context_slots, make_batch, make_cache, normal

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
FORMATS = ["bf16", "fp8_e4m3", "int8_per_token_head", "int4_per_token_head"]


@triton.jit
def copy_some(source, target, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    first = tl.load(source)
    tl.store(target + i, tl.load(source + i, mask=i < n, other=0.0) + first, mask=i < n)


@interpreted
def test_loads_and_stores_are_counted() -> None:
    source, target, other = torch.ones(16), torch.zeros(16), torch.zeros(16)
    with traffic(source=source, target=target, other=other) as seen:
        copy_some[(1,)](source, target, 5, BLOCK=8)
    copy_some[(1,)](source, target, 16, BLOCK=16)  # outside: not counted
    assert seen["source"].reads[:, 0].tolist() == [2, 1, 1, 1, 1] + [0] * 11
    assert seen["target"].writes.sum(1).tolist() == [4] * 5 + [0] * 11
    assert seen["source"].bytes_written == seen["target"].bytes_read == seen["other"].bytes_read == 0


def test_only_contiguous_tensors_are_counted() -> None:
    with pytest.raises(ValueError, match="view is not a contiguous"), traffic(view=torch.zeros(4, 4)[:, 1:]):
        pass


def test_compulsory_bytes_by_hand() -> None:
    spec = KVSpec(16, 8, 128, "bf16")
    moved = compulsory(spec, [4096, 100], [1, 1], 32, None, 2)
    assert moved.codes == (4096 + 100) * 8 * 2 * 128 * 2
    assert moved.rows == 2 * 2 * 32 * 128 * 2
    assert moved.table == 4 * (256 + 7)
    assert moved.scales == moved.splits == 0
    int4 = compulsory(KVSpec(16, 8, 128, "int4_per_token_head"), [4096], [1], 32, None, 2)
    assert int4.codes == 4096 * 8 * 2 * 64
    assert int4.scales == 4096 * 8 * 2 * 2


def test_windows_and_empty_sequences() -> None:
    assert visible_keys(100, 1, 10) == 10
    assert visible_keys(100, 8, 10) == 17
    assert visible_keys(5, 2, 10) == 5
    assert visible_keys(5, 0, None) == visible_keys(0, 1, None) == 0
    assert pages_of(100, 10, 16) == 2  # keys 90 .. 99: blocks 5 and 6
    assert pages_of(96, 16, 16) == 1
    assert pages_of(97, 16, 16) == 2
    assert pages_of(100, 0, 16) == 0


def test_partial_results_of_splits_are_counted() -> None:
    spec = KVSpec(16, 8, 128, "bf16")
    whole = launched(spec, [4096], [1], 32, None, 2, [1])
    split = launched(spec, [4096], [1], 32, None, 2, [8])
    assert whole.splits == 0
    assert split.total - whole.total == 8 * 2 * 4 * 130 * 32


@pytest.mark.parametrize("name", FORMATS)
def test_the_launch_moves_little_more_than_it_must(name: str) -> None:
    short = pytest.importorskip("quire.kernels.triton.attention_short")
    spec = KVSpec(16, 8, 128, name)
    for count, length in ((64, 4096), (8, 1000), (1, 32768), (16, 300)):
        lens, rows = [length] * count, [1] * count
        least = compulsory(spec, lens, rows, 32, None, 2)
        moved = launched(spec, lens, rows, 32, None, 2, [short.segments(n) for n in lens])
        assert 1 <= moved.total / least.total <= (1.15 if short.segments(length) > 1 else 1.05)


@interpreted
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("window", [None, 20])
def test_every_visible_key_is_read_once(name: str, window: int | None) -> None:
    if "triton" not in implementations("attention"):
        pytest.skip("there is no Triton attention")
    q_lens, contexts, q_heads, dim = [1, 1, 3], [0, 37, 30], 4, 64
    spec = KVSpec(16, 2, dim, name)
    batch = make_batch(q_lens, contexts, spec.block_size)
    batch.short_seqs = len(q_lens)
    cache = make_cache(batch, spec)
    attention = implementations("attention")["triton"]
    counted = {"k": cache.k, "v": cache.v}
    if spec.coding.scale == "token":
        assert cache.k_scale is not None
        assert cache.v_scale is not None
        counted |= {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    q = normal((batch.num_tokens, q_heads, dim), torch.bfloat16)
    plan = attention.prepare(batch, spec.block_size, window)
    with traffic(**counted) as seen:
        attention.run(q, cache, plan, dim**-0.5, 0.0, None)

    expected = torch.zeros(cache.k.shape[0] * spec.block_size, dtype=torch.int64)
    seq_lens = [q + c for q, c in zip(q_lens, contexts, strict=True)]
    for seq, (length, rows) in enumerate(zip(seq_lens, q_lens, strict=True)):
        keys = visible_keys(length, rows, window)
        expected[context_slots(batch, seq, spec)[length - keys :]] = 1
    for what, found in seen.items():
        reads = torch.from_numpy(found.reads).flatten(0, 1).flatten(1)
        assert (reads == expected[:, None]).all(), f"{what}: slots read {reads.amax(1).tolist()}"
        assert found.bytes_written == 0
    least = compulsory(spec, seq_lens, q_lens, q_heads, window, 2)
    assert sum(found.bytes_read for found in seen.values()) == least.codes + least.scales
