"""Paged attention: ragged batches on poisoned caches, against the reference and against dense torch attention."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.batch import SHORT_ROWS, KVSpec, LayerKV, RaggedBatch
from quire.kernels.testing import (
    FORMATS,
    TOLERANCE,
    assert_close,
    cases,
    challengers,
    context_slots,
    grow_tree,
    make_batch,
    make_cache,
    normal,
    pair,
)

RAGGED: dict[str, tuple[list[int], list[int]]] = {  # name: rows and contexts of the sequences
    "one decode": ([1], [40]),
    "first token": ([1], [0]),
    "decodes": ([1] * 17, [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 300]),
    "prompts": ([1, 63, 64, 65], [0, 0, 0, 0]),
    "chunks": ([63, 64, 65, 1], [64, 1, 200, 129]),
    "mixed": ([1, 5, 0, 33, 1, 2, 100], [80, 64, 0, 16, 500, 31, 7]),
    "twins": ([4, 4, 4, 20, 20], [50, 49, 50, 0, 0]),
    "padding": ([1, 0, 0], [3, 0, 0]),
    "nobody": ([], []),
}
# Triton's interpreter computes in fp32 whatever the dtype, and takes its time.
CASES, CHALLENGERS = (
    [case for case in of("attention") if case != ("triton", torch.bfloat16) or torch.cuda.is_available()]
    for of in (cases, challengers)
)


def run(
    name: str,
    batch: RaggedBatch,
    cache: LayerKV,
    q: torch.Tensor,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    ours, _ = pair("attention", name)
    plan = ours.prepare(batch, cache.spec.block_size, window)
    return ours.run(q, cache, plan, q.shape[2] ** -0.5, softcap, sinks)


def check(name: str, batch: RaggedBatch, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, **options: Any) -> None:
    long = (batch.cu_q.diff() > SHORT_ROWS).nonzero()
    batch.short_seqs = int(long[0]) if len(long) else batch.num_seqs
    cache = make_cache(batch, KVSpec(16, kv_heads, 32, FORMATS[dtype]))
    q = normal((batch.num_tokens, heads + 2 * kv_heads, 32), dtype, 3)[:, :heads]
    expected, expected_lse = run("reference", batch, cache, q, **options)
    assert not expected.isnan().any()
    o, lse = run(name, batch, cache, q, **options)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close(o, expected, dtype)
    assert_close(lse, expected_lse, dtype)


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
@pytest.mark.parametrize("window", [None, 1, 24, 64])
@pytest.mark.parametrize("shape", RAGGED)
def test_ragged(name: str, dtype: torch.dtype, shape: str, window: int | None) -> None:
    check(name, make_batch(*RAGGED[shape], block_size=16), dtype, window=window)


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (8, 1)])
def test_head_groups(name: str, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    check(name, make_batch(*RAGGED["mixed"], block_size=16), dtype, heads, kv_heads)


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
@pytest.mark.parametrize("shape", ["decodes", "mixed", "padding"])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(4.0, False), (0.0, True), (4.0, True)])
def test_softcap_and_sinks(name: str, dtype: torch.dtype, shape: str, softcap: float, with_sinks: bool) -> None:
    sinks = normal((6,), torch.float32, 5) if with_sinks else None
    for window in (None, 24):
        batch = make_batch(*RAGGED[shape], block_size=16)
        check(name, batch, dtype, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
@pytest.mark.parametrize("window", [None, 70])
def test_trees(name: str, dtype: torch.dtype, window: int | None) -> None:
    batch = make_batch([1, 5, 5, 63, 30, 6], [9, 64, 0, 100, 0, 65], block_size=16)
    grow_tree(batch, 1, [-1, -1, 0, 1])
    grow_tree(batch, 3, [random.Random(i).randint(-1, i - 1) for i in range(62)])
    grow_tree(batch, 5, [-1, 0, 1, 2, 3])  # a chain
    check(name, batch, dtype, window=window)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_chain_is_causal(name: str, dtype: torch.dtype) -> None:
    plain, chain = (make_batch([7, 1], [30, 12], block_size=16) for _ in range(2))
    grow_tree(chain, 0, [-1, 0, 1, 2, 3, 4])
    cache = make_cache(plain, KVSpec(16, 2, 32, FORMATS[dtype]))
    q = normal((8, 6, 32), dtype)
    assert_close(run(name, chain, cache, q)[0], run(name, plain, cache, q)[0], dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_tree_path_equals_its_own_sequence(name: str, dtype: torch.dtype) -> None:
    """The row of a draft node gets what it would get had its ancestors alone been computed, in a row."""
    tree = make_batch([5], [20], block_size=16)
    grow_tree(tree, 0, [-1, -1, 1, 2])  # rows 0, 2, 3, 4 are a path
    spec = KVSpec(16, 2, 32, FORMATS[dtype])
    cache, q = make_cache(tree, spec), normal((5, 6, 32), dtype)
    result = run(name, tree, cache, q)[0][4]
    path = make_batch([4], [20], block_size=16)
    keep = context_slots(tree, 0, spec)[[*range(20), 20, 22, 23, 24]]
    into = context_slots(path, 0, spec)
    alone = make_cache(path, spec)
    for pages, old in ((alone.k, cache.k), (alone.v, cache.v)):
        pages.flatten(0, 1)[into] = old.flatten(0, 1)[keep]
    assert_close(result, run(name, path, alone, q[[0, 2, 3, 4]])[0][3], dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize(("rows", "context"), [(1, 77), (40, 0), (40, 77)])
def test_dense_attention(name: str, dtype: torch.dtype, rows: int, context: int) -> None:
    batch = make_batch([rows], [context], block_size=16)
    spec = KVSpec(16, 2, 64, FORMATS[dtype])
    cache, q = make_cache(batch, spec), normal((rows, 6, 64), dtype)
    slots = context_slots(batch, 0, spec)
    keys, values = (x.flatten(0, 1)[slots].double().repeat_interleave(3, 1).transpose(0, 1) for x in (cache.k, cache.v))
    causal = torch.ones(rows, context + rows).tril(context).bool()
    expected = F.scaled_dot_product_attention(q.double().transpose(0, 1), keys, values, attn_mask=causal)
    o, lse = run(name, batch, cache, q)
    assert_close(o, expected.transpose(0, 1), dtype)
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) / 8
    assert_close(lse, scores.masked_fill(~causal, float("-inf")).logsumexp(-1).T, dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_rows_that_see_nothing(name: str, dtype: torch.dtype) -> None:
    batch = make_batch([2, 1], [0, 4], block_size=16)
    batch.seq_lens[0] = 0  # as in a padded batch: rows, but no keys
    cache = make_cache(batch, KVSpec(16, 2, 32, FORMATS[dtype]))
    q = normal((3, 4, 32), dtype)
    o, lse = run(name, batch, cache, q)
    assert torch.equal(o[:2], torch.zeros_like(o[:2]))
    assert (lse[:2] == float("-inf")).all()
    assert torch.isfinite(o).all()
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0])
    o, lse = run(name, batch, cache, q, sinks=sinks)
    assert torch.equal(o[:2], torch.zeros_like(o[:2]))
    assert_close(lse[:2], sinks.expand(2, 4), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_batch_mates_do_not_change_a_bit_on_the_cpu(dtype: torch.dtype, window: int | None) -> None:
    q_lens, contexts = [1, 1, 1, 5, 5, 40, 33, 1], [100, 103, 7, 60, 61, 90, 0, 300]
    batch = make_batch(q_lens, contexts, block_size=16)
    cache = make_cache(batch, KVSpec(16, 2, 32, FORMATS[dtype]))
    q = normal((batch.num_tokens, 6, 32), dtype)
    together, lse_together = run("cpu", batch, cache, q, window=window)
    for s, (rows, context) in enumerate(zip(q_lens, contexts, strict=True)):
        alone = make_batch([rows], [context], block_size=16)
        width = alone.block_table.shape[1]
        alone.block_table = batch.block_table[s : s + 1, :width].contiguous()
        mine = slice(int(batch.cu_q[s]), int(batch.cu_q[s + 1]))
        o, lse = run("cpu", alone, cache, q[mine], window=window)
        assert torch.equal(o, together[mine])
        assert torch.equal(lse, lse_together[mine])


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_batch(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    q_lens = data.draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    contexts = data.draw(st.lists(st.integers(0, 90), min_size=count, max_size=count))
    batch = make_batch(q_lens, contexts, block_size=16)
    for s, rows in enumerate(q_lens):
        if rows > 1 and data.draw(st.booleans()):
            grow_tree(batch, s, [data.draw(st.integers(-1, i - 1)) for i in range(rows - 1)])
    check(name, batch, dtype, window=data.draw(st.sampled_from([None, 1, 2, 17, 64])))


@pytest.mark.parametrize(("name", "dtype"), cases("merge_states", (torch.float32,)))
def test_merged_parts_equal_the_whole(name: str, dtype: torch.dtype) -> None:
    merge = pair("merge_states", name)[0].run
    q, keys, values = normal((9, 4, 16), dtype), normal((50, 4, 16), dtype, 1), normal((50, 4, 16), dtype, 2)

    def part(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.einsum("rhd,nhd->rhn", q, keys)
        return torch.einsum("rhn,nhd->rhd", scores.softmax(-1), values), scores.logsumexp(-1)

    whole, lse = part(keys, values)
    parts = [part(keys[cut], values[cut]) for cut in (slice(0, 1), slice(1, 20), slice(20, 50))]
    nothing = (torch.zeros_like(whole), torch.full_like(lse, float("-inf")))
    for sources in (parts, [nothing, *parts], [parts[2], parts[0], nothing, parts[1]]):
        merged, merged_lse = merge([o for o, _ in sources], [x for _, x in sources])
        torch.testing.assert_close(merged, whole, **TOLERANCE[dtype])
        torch.testing.assert_close(merged_lse, lse, **TOLERANCE[dtype])
    empty, empty_lse = merge([nothing[0]] * 2, [nothing[1]] * 2)
    assert torch.equal(empty, nothing[0])
    assert torch.equal(empty_lse, nothing[1])
