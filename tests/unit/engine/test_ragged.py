"""Rows laid end to end, held against what each row by itself must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.engine.ragged import Layout, Parents, batch_of, depths_and_masks, lay_out
from quire.engine.slots import SlotTable
from quire.engine.spec.proposer import DraftTree
from quire.engine.spec.segments import Segment, gather
from quire.kernels.batch import SHORT_ROWS
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import NewSeq, Row

SIZE = 4
CPU = torch.device("cpu")
TABLE = np.arange(1, 61, dtype=np.int32).reshape(3, 20)
# Sequences in the order of a batch: a decode, a tree of two roots, a chunk that is longer than short rows are.
OWNERS, STARTS, COUNTS = np.array([2, 0, 1]), np.array([7, 9, 0]), np.array([1, 5, SHORT_ROWS + 3])
FOREST = [-1, -1, 0, 0, 2]


def ancestors(parents: Parents, row: int) -> set[int]:
    """The row itself included."""
    found = {row}
    while parents[row] >= 0:
        row = parents[row]
        found.add(row)
    return found


def bits(mask: int) -> set[int]:
    return {place for place in range(64) if mask >> place & 1}


def check(layout: Layout, trees: dict[int, Parents]) -> None:
    rows = [(s, i) for s, count in enumerate(COUNTS) for i in range(count)]
    for t, (s, i) in enumerate(rows):
        index = STARTS[s] + i
        assert layout.slot_mapping[t] == TABLE[OWNERS[s], index // SIZE] * SIZE + index % SIZE
        if s in trees:
            seen = ancestors(trees[s], i)
            assert bits(int(layout.tree_mask[t])) == seen
            index = STARTS[s] + len(seen) - 1
        elif trees:
            assert layout.tree_mask[t] == 0
        assert layout.positions[t] == index


@pytest.mark.parametrize("trees", [{}, {1: FOREST}])
def test_every_row_is_where_it_belongs(trees: dict[int, Parents]) -> None:
    layout = lay_out(TABLE, OWNERS, STARTS, COUNTS, SIZE, trees)
    check(layout, trees)
    assert layout.cu_q.tolist() == [0, *np.cumsum(COUNTS)]
    assert layout.seq_lens.tolist() == (STARTS + COUNTS).tolist()
    assert np.array_equal(layout.block_table, TABLE[OWNERS, :5])
    assert (layout.max_q, layout.max_seq_len, layout.short_seqs) == (SHORT_ROWS + 3, SHORT_ROWS + 3, 2)
    assert len(layout.tree_mask) == (COUNTS.sum() if trees else 0)


def test_a_wrong_place_is_caught() -> None:
    layout = lay_out(TABLE, OWNERS, STARTS, COUNTS, SIZE, {1: [-1, -1, 0, 1, 2]})
    with pytest.raises(AssertionError):
        check(layout, {1: FOREST})
    with pytest.raises(AssertionError):
        check(lay_out(TABLE, OWNERS, STARTS + np.array([0, 1, 0]), COUNTS, SIZE), {})


def test_masks_of_trees_are_their_ancestors() -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 17, 64):
        parents = [int(random.integers(-1, row)) if row else -1 for row in range(count)]
        depths, masks = depths_and_masks(parents)
        seen = [ancestors(parents, row) for row in range(count)]
        assert depths == [len(rows) - 1 for rows in seen]
        assert [bits(mask) for mask in masks] == seen
    assert depths_and_masks(range(-1, 63))[1][63] == -1  # 64 rows, one behind the other: every bit, as int64


def test_what_no_row_needs_of_a_tree_is_not_in_the_batch() -> None:
    layout = lay_out(TABLE, OWNERS[:1], STARTS[:1], COUNTS[:1], SIZE)
    batch = batch_of(layout, [torch.from_numpy(array) for array in (np.zeros(1), *layout.arrays, np.zeros(1))])
    assert (batch.tree_mask, batch.num_tokens, batch.short_seqs) == (None, 1, 1)


def test_slots_and_segments_are_laid_out_alike() -> None:
    """A decode and the verification of a tree, from the slots and as the segments of a proposer."""
    tree = DraftTree((31, 32, 33, 34), (-1, -1, 0, 0))
    slots, tokens = SlotTable(2, 64, SIZE, CPU), [list(range(8)), list(range(10, 16))]
    for slot, known in enumerate(tokens):
        blocks = tuple(TABLE[slot, :5].tolist())
        slots.fill(NewSeq(slot, tuple(known), 1, SamplingParams(max_tokens=4), 0, blocks))
    ours = slots.gather([Row(0, 7, 1), Row(1, 5, 5)], [0, 1, 3], {1: tree})
    segments = [
        Segment(TABLE[0], 7, tokens[0][7:], [0]),
        Segment(TABLE[1, :3], 5, [15, *tree.tokens], [0, 2], [-1, 0, 0, 1, 1]),
    ]
    theirs = gather(segments, SIZE, CPU)
    for name in ("input_ids", "positions", "slot_mapping", "cu_q", "seq_lens", "tree_mask", "logit_rows"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.block_table[0], theirs.block_table[0])
    assert ours.positions.tolist() == [7, 5, 6, 6, 7, 7]
