"""A prefix read once for a group: the same attention as without, and the groups that a block table holds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels import shared_prefix
from quire.kernels.batch import KVSpec, LayerKV, RaggedBatch, SharedPrefix
from quire.kernels.cpu.native import library
from quire.kernels.shared_prefix import find_shared_prefixes
from quire.kernels.testing import FORMATS, assert_close, challengers, grow_tree, make_batch, make_cache, normal, pair

BLOCK = 16
# Triton's own tests (test_triton_attention.py) have smaller batches: its interpreter takes its time.
CHALLENGERS = [case for case in challengers("attention") if case[0] != "triton" or torch.cuda.is_available()]
needs_native = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))


def found(batch: RaggedBatch) -> RaggedBatch:
    """The batch with its groups, as the engine prepares it."""
    num_rows = np.diff(batch.cu_q.numpy())
    groups = find_shared_prefixes(batch.block_table.numpy(), num_rows, batch.seq_lens.numpy() - num_rows, BLOCK)
    return replace(batch, shared=groups)


def share(batch: RaggedBatch, seqs: Sequence[int], blocks: int) -> None:
    """Let sequences begin with the first one's blocks."""
    batch.block_table[list(seqs), :blocks] = batch.block_table[seqs[0], :blocks].clone()


def run(name: str, batch: RaggedBatch, cache: LayerKV, q: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    ours, _ = pair("attention", name)
    arguments = {"window": None, "softcap": 0.0, "sinks": None} | options
    plan = ours.prepare(batch, BLOCK, arguments["window"])
    return ours.run(q, cache, plan, q.shape[2] ** -0.5, arguments["softcap"], arguments["sinks"])


def check(name: str, batch: RaggedBatch, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, **options: Any) -> None:
    """Against the reference on a cache that is NaN wherever no sequence reads."""
    cache = make_cache(batch, KVSpec(BLOCK, kv_heads, 32, FORMATS[dtype]))
    q = normal((batch.num_tokens, heads, 32), dtype, 3)
    expected, expected_lse = run("reference", replace(batch, shared=()), cache, q, **options)
    assert not expected.isnan().any()
    o, lse = run(name, batch, cache, q, **options)
    assert_close(o, expected, dtype)
    assert_close(lse, expected_lse, dtype)


def random_tree(rng: random.Random, q_lens: Sequence[int]) -> RaggedBatch:
    """Sequences that grew out of each other: each begins with some of the blocks of one before it, or with none."""
    batch = make_batch(q_lens, [rng.randrange(200, 1300) for _ in q_lens], BLOCK, rng.randrange(1000))
    contexts = (batch.seq_lens - batch.cu_q.diff()).tolist()
    for s in range(1, len(q_lens)):
        parent = rng.randrange(min(s, 3))
        full = min(contexts[s], contexts[parent]) // BLOCK
        share(batch, [parent, s], rng.choice([0, full // 2, full, full]))
    return batch


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
@pytest.mark.parametrize("seed", range(6))
def test_trees_of_prefixes(name: str, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    batch = found(random_tree(rng, [rng.choice([1, 1, 1, 1, 3, 16, 17]) for _ in range(14)]))
    assert batch.shared
    check(name, batch, dtype)


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (14, 2), (8, 1), (130, 1)])
def test_head_groups(name: str, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    batch = make_batch([1, 1, 4, 1], [330, 500, 340, 321], BLOCK)
    share(batch, range(4), 20)
    check(name, replace(batch, shared=(SharedPrefix((0, 1, 2, 3), 20),)), dtype, heads, kv_heads)


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
@pytest.mark.parametrize("window", [None, 100, 2000])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(4.0, False), (0.0, True), (4.0, True)])
def test_options(name: str, dtype: torch.dtype, window: int | None, softcap: float, with_sinks: bool) -> None:
    """Of the two sources one is given the sinks; a window has its own edge in every sequence."""
    batch = make_batch([1] * 6, [600, 530, 900, 520, 520, 777], BLOCK)
    share(batch, range(6), 32)
    batch = found(batch)
    assert batch.shared == (SharedPrefix((0, 1, 2, 3, 4, 5), 32),)
    sinks = normal((6,), torch.float32, 5) if with_sinks else None
    check(name, batch, dtype, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
@pytest.mark.parametrize("blocks", [1, 3, 4, 5, 31, 32, 33, 40, 64])
def test_any_length_of_prefix(name: str, dtype: torch.dtype, blocks: int) -> None:
    """Below, at and between the tiles of 64 and the segments of 512 keys; the last row has just begun its own block."""
    contexts = [blocks * BLOCK + own for own in (0, 1, 40, 700, 0)]
    batch = make_batch([1] * 5, contexts, BLOCK)
    share(batch, range(5), blocks)
    check(name, replace(batch, shared=(SharedPrefix((0, 1, 2, 3, 4), blocks),)), dtype)


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
def test_groups_and_others(name: str, dtype: torch.dtype) -> None:
    """Two groups, one of a single sequence, prompts, draft trees in and out of a group, sequences without rows."""
    q_lens = [1, 1, 6, 1, 1, 0, 1, 50, 5, 1]
    batch = make_batch(q_lens, [400, 410, 420, 700, 650, 640, 90, 0, 300, 1100], BLOCK)
    share(batch, [0, 1, 2], 25)
    share(batch, [5, 4, 3], 38)
    grow_tree(batch, 2, [-1, 0, 0, 1, 3])
    grow_tree(batch, 8, [-1, -1, 0, 1])
    groups = (SharedPrefix((2, 0, 1), 25), SharedPrefix((5, 3, 4), 38), SharedPrefix((9,), 60))
    check(name, replace(batch, shared=groups), dtype)


@pytest.mark.parametrize(("name", "dtype"), CHALLENGERS)
def test_a_sequence_that_leaves(name: str, dtype: torch.dtype) -> None:
    """One ends, then one gets blocks of its own midway: the groups follow the table."""
    batch = make_batch([1] * 8, [640] * 8, BLOCK)
    share(batch, range(8), 40)
    whole = found(batch)
    assert whole.shared == (SharedPrefix(tuple(range(8)), 40),)
    check(name, whole, dtype)
    fewer = make_batch([1] * 7, [640] * 7, BLOCK)
    fewer.block_table = batch.block_table[[0, 1, 2, 4, 5, 6, 7]]
    assert found(fewer).shared == (SharedPrefix(tuple(range(7)), 40),)
    check(name, found(fewer), dtype)
    fewer.block_table[3, 2:] = torch.arange(900, 900 + fewer.block_table.shape[1] - 2)
    assert found(fewer).shared == (SharedPrefix((0, 1, 2, 4, 5, 6), 40),)
    check(name, found(fewer), dtype)


@needs_native
class TestNative:
    @pytest.fixture(params=itertools.product(library.levels(), (1, 2, 16)), ids=str)
    def way(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Every instruction set, by few tasks for the threads and by many."""
        before = torch.get_num_threads()
        library.use_level(library.levels().index(request.param[0]))
        torch.set_num_threads(request.param[1])
        yield
        torch.set_num_threads(before)
        library.use_level(0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.usefixtures("way")
    def test_not_a_bit_differs(self, dtype: torch.dtype) -> None:
        """A row goes on from the prefix's state exactly as if it had come there alone."""
        for seed, heads in ((0, 6), (1, 14)):
            rng = random.Random(seed)
            batch = found(random_tree(rng, [rng.choice([1, 1, 1, 5]) for _ in range(10)]))
            assert batch.shared
            cache = make_cache(batch, KVSpec(BLOCK, 2, 32, FORMATS[dtype]))
            q = normal((batch.num_tokens, heads, 32), dtype)
            together, apart = (run("native", b, cache, q) for b in (batch, replace(batch, shared=())))
            assert torch.equal(together[0], apart[0])
            assert torch.equal(together[1], apart[1])

    def test_nan_stays_in_its_row(self) -> None:
        batch = make_batch([1] * 5, [600] * 5, BLOCK)
        share(batch, range(5), 36)
        cache = make_cache(batch, KVSpec(BLOCK, 2, 32, "bf16"))
        q = normal((5, 4, 32), torch.bfloat16)
        q[2, 1, 7] = float("nan")
        o, lse = run("native", replace(batch, shared=(SharedPrefix((0, 1, 2, 3, 4), 36),)), cache, q)
        assert o[2, 1].isnan().all()
        assert o.isnan().sum() == 32
        assert lse.isnan().sum() == 1

    def test_the_prefix_is_read_from_the_group(self) -> None:
        """Planted: a sequence is put in a group that it does not belong to, and gets the group's keys."""
        batch = make_batch([1] * 3, [300] * 3, BLOCK)
        share(batch, [0, 1], 16)
        cache = make_cache(batch, KVSpec(BLOCK, 2, 32, "fp32"))
        q = normal((3, 4, 32), torch.float32)
        right = run("native", batch, cache, q)[0]
        wrong = run("native", replace(batch, shared=(SharedPrefix((0, 1, 2), 16),)), cache, q)[0]
        assert torch.equal(wrong[:2], right[:2])
        assert not torch.allclose(wrong[2], right[2], atol=1e-2)

    @pytest.mark.parametrize(
        "groups",
        [
            ((0, 1), 20),  # past the context of 300 keys
            ((0, 2), 16),
            ((0, -1), 16),
            ((0, 1, 0), 16),
        ],
    )
    def test_groups_that_are_none(self, groups: tuple[tuple[int, ...], int]) -> None:
        batch = make_batch([1, 1], [300, 300], BLOCK)
        cache = make_cache(batch, KVSpec(BLOCK, 2, 32, "fp32"))
        with pytest.raises(IndexError, match="shared prefix"):
            run("native", replace(batch, shared=(SharedPrefix(*groups),)), cache, normal((2, 4, 32), torch.float32))

    def test_blocks_outside_of_the_cache(self) -> None:
        batch = make_batch([1] * 4, [300] * 4, BLOCK)
        share(batch, range(4), 18)
        cache = make_cache(batch, KVSpec(BLOCK, 2, 32, "fp32"))
        batch.block_table[0, 3] = cache.k.shape[0]
        groups = (SharedPrefix((0, 1, 2, 3), 18),)
        with pytest.raises(IndexError, match="outside of the cache"):
            run("native", replace(batch, shared=groups), cache, normal((4, 4, 32), torch.float32))


def by_definition(prompts: list[tuple[int, ...]], min_blocks: int, min_saved: int) -> set[tuple[tuple[int, ...], int]]:
    """The groups of full leading blocks, read from the tree of prefixes node by node."""

    def starting(prefix: tuple[int, ...]) -> list[int]:
        return [s for s, prompt in enumerate(prompts) if prompt[: len(prefix)] == prefix]

    def saved(groups: set[tuple[tuple[int, ...], int]]) -> int:
        return sum((len(members) - 1) * depth for members, depth in groups)

    def below(prefix: tuple[int, ...]) -> set[tuple[tuple[int, ...], int]]:
        members = starting(prefix)
        if len(members) < 2:
            return set()
        branches = {prompts[s][: len(prefix) + 1] for s in members if len(prompts[s]) > len(prefix)}
        if len(branches) == 1 and all(len(prompts[s]) > len(prefix) for s in members):
            return below(branches.pop())
        groups: set[tuple[tuple[int, ...], int]] = set()
        for branch in branches:
            deeper = below(branch)
            if saved(deeper) > len(starting(branch)) * len(prefix):
                groups |= deeper
                members = [s for s in members if s not in starting(branch)]
        if (len(members) - 1) * len(prefix) >= min_saved:
            groups.add((tuple(members), len(prefix)))
        return groups

    return set().union(*(below(beginning) for beginning in {p[:min_blocks] for p in prompts if len(p) >= min_blocks}))


PROMPTS = st.lists(st.lists(st.integers(1, 2), max_size=7).map(tuple), min_size=1, max_size=9)


@given(PROMPTS, st.integers(1, 3), st.integers(1, 8), st.integers(1, 4), st.randoms())
@settings(max_examples=300, deadline=None)
def test_detection(
    prompts: list[tuple[int, ...]], min_blocks: int, min_saved: int, block_size: int, rng: random.Random
) -> None:
    """Against the definition; what lies behind a row's full blocks does not count, be it equal or not."""
    ids = {prefix: i + 1 for i, prefix in enumerate({p[:n] for p in prompts for n in range(1, len(p) + 1)})}
    table = np.array([[ids[p[: n + 1]] if n < len(p) else rng.randrange(3) for n in range(8)] for p in prompts])
    contexts = np.array([len(p) * block_size + rng.randrange(block_size) for p in prompts])
    limits = {"MIN_KEYS": min_blocks * block_size, "MIN_SAVED": min_saved * block_size, "LEVELS": 9}
    with mock.patch.multiple(shared_prefix, **limits):
        groups = find_shared_prefixes(table.astype(np.int32), np.ones(len(prompts), int), contexts, block_size)
    assert {(group.seqs, group.num_blocks) for group in groups} == by_definition(prompts, min_blocks, min_saved)
    members = [s for group in groups for s in group.seqs]
    assert len(members) == len(set(members))
    for group in groups:
        assert len({tuple(table[s, : group.num_blocks]) for s in group.seqs}) == 1


class TestDetection:
    def test_nothing_shared(self) -> None:
        assert found(make_batch([1] * 8, [900] * 8, BLOCK)).shared == ()
        assert found(make_batch([], [], BLOCK)).shared == ()

    def test_long_rows_and_short_prefixes_stay_alone(self) -> None:
        batch = make_batch([1, 1, 17, 1, 1, 1], [600, 600, 600, 255, 600, 600], BLOCK)
        share(batch, range(6), 15)
        share(batch, [0, 1, 2, 4], 37)
        assert found(batch).shared == (SharedPrefix((0, 1, 4), 37),)

    def test_the_block_being_written_is_not_shared(self) -> None:
        batch = make_batch([1] * 4, [512, 520, 527, 528], BLOCK)
        share(batch, range(4), 33)
        assert found(batch).shared == (SharedPrefix((0, 1, 2, 3), 32),)

    def test_a_deep_group_of_few_or_a_shallow_one_of_many(self) -> None:
        batch = make_batch([1] * 12, [2000] * 12, BLOCK)
        share(batch, range(12), 20)
        share(batch, range(8, 12), 120)
        assert set(found(batch).shared) == {SharedPrefix(tuple(range(8)), 20), SharedPrefix((8, 9, 10, 11), 120)}
        share(batch, range(12), 100)
        assert found(batch).shared == (SharedPrefix(tuple(range(12)), 100),)

    def test_a_long_chain_of_branchings_ends(self) -> None:
        """Nested deeper than the search looks and than a stack of calls is: what is left is grouped where it stops."""
        table = 1000 * np.arange(1, 1101, dtype=np.int32)[:, None] + np.arange(1000, dtype=np.int32)
        for s in range(1, 1100):
            table[s, : 1000 - s * 8 // 10] = table[s - 1, : 1000 - s * 8 // 10]
        groups = find_shared_prefixes(table, np.ones(1100, int), np.full(1100, 999 * BLOCK), BLOCK)
        members = [s for group in groups for s in group.seqs]
        assert len(members) == len(set(members)) > 1000
