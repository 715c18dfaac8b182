"""Attention in Triton: sequences with few rows and with many, every format, odd shapes, splits, shared prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import implementations
from quire.kernels.batch import SHORT_ROWS, KVSpec, LayerKV, RaggedBatch, SharedPrefix
from quire.kernels.kv_formats import kv_formats
from quire.kernels.testing import assert_close, context_slots, grow_tree, make_batch, make_cache, normal

if "triton" not in implementations("attention"):
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

from quire.kernels.triton import attention_shared, attention_short

FORMATS = kv_formats()
QUANTIZED = tuple(name for name in FORMATS if name not in ("fp32", "fp16", "bf16"))
Result = tuple[torch.Tensor, torch.Tensor]


def ragged(q_lens: Sequence[int], contexts: Sequence[int], short: bool = True, block_size: int = 16) -> RaggedBatch:
    """A batch whose leading sequences with few rows are told to be short, or none of them."""
    batch = make_batch(q_lens, contexts, block_size)
    long = next((i for i, rows in enumerate(q_lens) if rows > SHORT_ROWS), len(q_lens))
    batch.short_seqs = long if short else 0
    return batch


def run(
    name: str,
    batch: RaggedBatch,
    cache: LayerKV,
    q: torch.Tensor,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> Result:
    ours = implementations("attention")[name]
    plan = ours.prepare(batch, cache.spec.block_size, window)
    return ours.run(q, cache, plan, q.shape[2] ** -0.5, softcap, sinks)


def check(
    batch: RaggedBatch,
    kv_format: str = "fp32",
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    **options: Any,
) -> None:
    """Against the reference, on a cache that is poison wherever nobody's keys are, with q a slice of wider rows."""
    cache = make_cache(batch, KVSpec(block_size, kv_heads, head_dim, kv_format))
    q = normal((batch.num_tokens, heads + 2 * kv_heads, head_dim), torch.float32, 3)[:, :heads]
    expected, expected_lse = run("reference", batch, cache, q, **options)
    assert not expected.isnan().any()
    o, lse = run("triton", batch, cache, q, **options)
    assert_close(o, expected, q.dtype)
    assert_close(lse, expected_lse, q.dtype)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize(
    "options", [{}, {"window": 24, "softcap": 4.0, "sinks": normal((6,), torch.float32, 5)}], ids=str
)
def test_formats(kv_format: str, options: dict[str, Any]) -> None:
    check(ragged([1, 5, 0, 1, 33, 20], [80, 64, 0, 600, 70, 0]), kv_format, **options)


@pytest.mark.parametrize("kv_format", ["fp32", *QUANTIZED])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (16, 2)])
def test_head_groups(kv_format: str, heads: int, kv_heads: int) -> None:
    """1, 3 and 8 query heads on a KV head; a sequence of 16 rows fills tiles of its own size."""
    check(ragged([1, 16, 2, 18], [70, 40, 130, 9]), kv_format, heads, kv_heads)


@pytest.mark.parametrize("head_dim", [16, 72, 80, 96, 256])
@pytest.mark.parametrize("kv_format", ["fp32", "fp8_e4m3", "int8_per_token_head"])
def test_head_sizes(head_dim: int, kv_format: str) -> None:
    check(ragged([1, 3, 20], [70, 40, 20]), kv_format, 2, 1, head_dim)


@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 100])
@pytest.mark.parametrize("window", [None, 50])
def test_block_sizes(block_size: int, window: int | None) -> None:
    check(ragged([1, 2, 30], [150, 99, 64], block_size=block_size), block_size=block_size, window=window)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 64])
@pytest.mark.parametrize("kv_format", ["fp32", "int4_per_token_head"])
def test_trees(short: bool, window: int | None, kv_format: str) -> None:
    batch = ragged([1, 5, 16, 63], [9, 64, 0, 100], short)
    grow_tree(batch, 1, [-1, -1, 0, 1])
    grow_tree(batch, 2, [-1, *range(14)])
    grow_tree(batch, 3, [(7 * i) % (i + 1) - 1 for i in range(62)])
    check(batch, kv_format, window=window)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-5.0, 0.0, 9.0, 100.0, 1.0, -100.0])], ids=["none", "sinks"])
@pytest.mark.parametrize("short", [True, False])
def test_softcap_and_sinks(softcap: float, sinks: torch.Tensor | None, short: bool) -> None:
    check(ragged([1, 1, 3], [0, 600, 40], short), softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("short", [True, False])
def test_rows_that_see_nothing(short: bool) -> None:
    batch = ragged([2, 1, 0], [0, 4, 0], short)
    batch.seq_lens[0] = 0  # as in a padded batch: rows, but no keys
    cache, q = make_cache(batch, KVSpec(16, 2, 32, "fp32")), normal((3, 4, 32), torch.float32)
    o, lse = run("triton", batch, cache, q)
    assert torch.equal(o[:2], torch.zeros_like(o[:2]))
    assert (lse[:2] == float("-inf")).all()
    assert torch.isfinite(o).all()
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0])
    o, lse = run("triton", batch, cache, q, sinks=sinks)
    assert torch.equal(o[:2], torch.zeros_like(o[:2]))
    assert_close(lse[:2], sinks.expand(2, 4), torch.float32)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_split_or_whole(kv_format: str) -> None:
    """Split over 1 program and over 8: the same but for rounding."""
    batch = ragged([1, 3], [500, 490])
    cache, q = make_cache(batch, KVSpec(16, 2, 32, kv_format)), normal((4, 6, 32), torch.float32)
    whole = run("triton", batch, cache, q)
    with mock.patch.object(attention_short, "SEGMENT", type(attention_short.SEGMENT)(64)):
        assert attention_short.segments(501) == 8
        split = run("triton", batch, cache, q)
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert not torch.equal(whole[0], split[0])


@given(st.integers(0, 500_000))
@settings(deadline=None)
def test_segments(num_keys: int) -> None:
    """A whole number of them covers the keys; no sequence that is shorter needs more than the grid is made for."""
    count = attention_short.segments(num_keys)
    assert 1 <= count <= attention_short.most_segments(num_keys) <= attention_short.SEGMENTS.value
    assert attention_short.most_segments(num_keys) <= attention_short.most_segments(num_keys + 1)


@pytest.mark.parametrize("kv_format", ["fp32", "int4_per_token_head"])
@pytest.mark.parametrize("window", [None, 50])
def test_batch_mates_do_not_change_a_bit(kv_format: str, window: int | None) -> None:
    q_lens, contexts = [1, 5, 1, 2, 16, 1], [100, 60, 7, 61, 90, 1300]
    batch = ragged(q_lens, contexts)
    cache = make_cache(batch, KVSpec(16, 2, 32, kv_format))
    q = normal((batch.num_tokens, 8, 32), torch.float32)
    together, lse_together = run("triton", batch, cache, q, window=window)
    for s, (rows, context) in enumerate(zip(q_lens, contexts, strict=True)):
        alone = ragged([rows], [context])
        alone.block_table = batch.block_table[s : s + 1, : alone.block_table.shape[1]].contiguous()
        mine = slice(int(batch.cu_q[s]), int(batch.cu_q[s + 1]))
        o, lse = run("triton", alone, cache, q[mine], window=window)
        assert torch.equal(o, together[mine])
        assert torch.equal(lse, lse_together[mine])


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("rows", [1, 20])
def test_needle(kv_format: str, rows: int) -> None:
    """One key among 2,000 that the query points at must win, in every format, wherever it lies."""
    batch = ragged([rows], [2000 - rows])
    spec = KVSpec(16, 1, 64, kv_format)
    cache = make_cache(batch, spec)
    slots = context_slots(batch, 0, spec)
    keys, values = normal((2000, 1, 64), torch.float32, 1), normal((2000, 1, 64), torch.float32, 2)
    implementations("kv_write")["reference"].run(keys, values, cache, slots)
    for place in (3, 1234):
        q = 12 * keys[place].expand(rows, 2, 64) / keys[place].norm() * 8
        o, _ = run("triton", batch, cache, q.contiguous())
        expected, _ = run("reference", batch, cache, q.contiguous())
        assert_close(o, expected, torch.bfloat16)
        found = torch.nn.functional.cosine_similarity(o[:, 0], values[place], dim=-1)
        assert (found > 0.98).all()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_rejected_drafts_leave_no_trace(kv_format: str) -> None:
    """Slots of rejected drafts are written again; what the drafts left in them, scales too, is gone."""
    spec = KVSpec(16, 2, 32, kv_format)
    drafted, after = ragged([5], [30]), ragged([3], [32])
    after.block_table = drafted.block_table
    cache = make_cache(drafted, spec)
    slots = context_slots(drafted, 0, spec)
    clean = make_cache(drafted, spec)
    k, v = (normal((3, 2, 32), torch.float32, seed) for seed in (7, 8))
    write = implementations("kv_write")["triton"].run
    write(100 * normal((3, 2, 32), torch.float32, 9), normal((3, 2, 32), torch.float32, 9), cache, slots[32:])
    for each in (cache, clean):
        write(k, v, each, slots[32:])
    q = normal((3, 6, 32), torch.float32)
    for rolled, straight in zip(run("triton", after, cache, q), run("triton", after, clean, q), strict=True):
        assert torch.equal(rolled, straight)


def test_scale_must_be_positive() -> None:
    batch = ragged([1], [3])
    cache, ours = make_cache(batch, KVSpec(16, 2, 32, "fp32")), implementations("attention")["triton"]
    with pytest.raises(ValueError, match="scale is 0"):
        ours.run(normal((1, 2, 32), torch.float32), cache, ours.prepare(batch, 16, None), 0, 0.0, None)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_batch(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    q_lens = sorted(data.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count)))
    contexts = data.draw(st.lists(st.integers(0, 90), min_size=count, max_size=count))
    batch = ragged(q_lens, contexts)
    batch.short_seqs = data.draw(st.integers(0, batch.short_seqs))
    for s, rows in enumerate(q_lens):
        if rows > 1 and data.draw(st.booleans()):
            grow_tree(batch, s, [data.draw(st.integers(-1, i - 1)) for i in range(rows - 1)])
    window = data.draw(st.sampled_from([None, 1, 2, 17, 64]))
    check(batch, data.draw(st.sampled_from(["fp32", *QUANTIZED])), window=window)


class TestSharedPrefix:
    @pytest.fixture(autouse=True)
    def any_size_is_worth_it(self) -> Iterator[None]:
        with mock.patch.object(attention_shared, "MIN_SAVED", 1):
            yield

    @staticmethod
    def batch(q_lens: Sequence[int], contexts: Sequence[int], groups: Sequence[SharedPrefix]) -> RaggedBatch:
        batch = ragged(q_lens, contexts)
        for group in groups:
            first = batch.block_table[group.seqs[0], : group.num_blocks].clone()
            batch.block_table[list(group.seqs), : group.num_blocks] = first
        batch.shared = tuple(groups)
        return batch

    @pytest.mark.parametrize("kv_format", ["fp32", *QUANTIZED])
    def test_formats(self, kv_format: str) -> None:
        """Two groups, a sequence in none, one without rows in this step, a prompt."""
        groups = (SharedPrefix((2, 0, 3), 5), SharedPrefix((4, 5), 38))
        batch = self.batch([1, 1, 4, 0, 1, 2, 20], [90, 40, 100, 80, 620, 640, 9], groups)
        check(batch, kv_format, softcap=4.0, sinks=normal((6,), torch.float32, 5))

    def test_trees_and_windows(self) -> None:
        batch = self.batch([1, 5, 1], [100, 96, 400], [SharedPrefix((0, 1, 2), 6)])
        grow_tree(batch, 1, [-1, -1, 0, 1])
        for window in (None, 20, 98):
            check(batch, window=window)

    def test_many_members(self) -> None:
        """More rows than a tile holds."""
        check(self.batch([1] * 18, [48 + i % 3 for i in range(18)], [SharedPrefix(tuple(range(18)), 3)]), "fp32", 8, 1)

    def test_the_keys_are_read_from_the_group(self) -> None:
        """Planted: a sequence is put in a group that it does not belong to, and gets the group's keys."""
        batch = self.batch([1] * 3, [300] * 3, [SharedPrefix((0, 1), 16)])
        cache, q = make_cache(batch, KVSpec(16, 2, 32, "fp32")), normal((3, 4, 32), torch.float32)
        right = run("triton", batch, cache, q)[0]
        wrong = run("triton", replace(batch, shared=(SharedPrefix((0, 1, 2), 16),)), cache, q)[0]
        assert torch.equal(wrong[:2], right[:2])
        assert not torch.allclose(wrong[2], right[2], atol=1e-2)

    def test_small_groups_are_left_alone(self) -> None:
        batch = self.batch([1] * 3, [300] * 3, [SharedPrefix((0, 1, 2), 16)])
        with mock.patch.object(attention_shared, "MIN_SAVED", 513):
            assert attention_shared.plan_shared(batch, 16) is None
        assert attention_shared.plan_shared(replace(batch, short_seqs=2), 16) is None
        assert attention_shared.plan_shared(batch, 16) is not None
