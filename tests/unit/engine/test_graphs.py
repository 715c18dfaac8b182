"""CUDA graphs without CUDA: a recorder replays by calling the function again, on the same persistent inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.errors import EngineStartError
from quire.engine.graphs import Graphs, Shape, Shapes
from quire.engine.messages import AddRequest
from quire.engine.slots import SlotTable
from quire.kernels.batch import RaggedBatch
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import NewSeq, Row

BLOCK = 16
PARAMS = SamplingParams(max_tokens=5)


class Recorder:
    """A capture that counts; it fails for the calls whose numbers are in `failing`."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.captures = self.replays = 0
        self._failing = failing

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captures += 1
        if self.captures in self._failing:
            raise RuntimeError("out of memory")

        def replay() -> Tensor:
            self.replays += 1
            return function()

        return replay


class TestShapes:
    @given(st.integers(1, 600), st.integers(2, 200_000), st.data())
    def test_the_least_shape_holds_the_step_and_wastes_little(self, max_num_seqs, max_model_len, data):
        shapes = Shapes(max_num_seqs, max_model_len)
        count = data.draw(st.integers(1, max_num_seqs))
        context = data.draw(st.integers(1, max_model_len))
        shape = shapes.least(count, context)
        assert count <= shape.num_seqs <= max(count * 1.25 + 8, 1)
        assert shape.num_seqs <= max_num_seqs
        assert context <= shape.context <= max_model_len
        assert shape.context <= max(4 * context, 2048)

    def test_the_least_is_the_least(self):
        shapes = Shapes(64, 10_000)
        assert shapes.seqs == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
        assert shapes.contexts == [2048, 8192, 10_000]
        for i, count in enumerate(shapes.seqs):
            assert shapes.least(count, 1).num_seqs == count
            if i:
                assert shapes.least(shapes.seqs[i - 1] + 1, 1).num_seqs == count
        assert [shapes.least(1, context).context for context in (1, 2048, 2049, 10_000)] == [2048, 2048, 8192, 10_000]

    @given(st.integers(1, 600), st.integers(2, 200_000))
    def test_the_start_is_bounded_and_the_largest_comes_first(self, max_num_seqs, max_model_len):
        shapes = Shapes(max_num_seqs, max_model_len)
        first = shapes.at_start()
        assert first[0] == shapes.largest
        assert len(set(first)) == len(first) <= 12
        assert Shape(1, shapes.contexts[0]) in first
        sizes = [(shape.context, shape.num_seqs) for shape in first]
        assert sizes == sorted(sizes, reverse=True)


class Batches:
    """A forward pass that notes its batch; a row's hidden state is its token, its position and what it may read."""

    def __init__(self) -> None:
        self.seen: list[RaggedBatch] = []

    def __call__(self, batch: RaggedBatch) -> Tensor:
        self.seen.append(batch)
        reads = batch.block_table.sum(1)[: batch.num_tokens] + batch.seq_lens
        return torch.stack([batch.input_ids, batch.positions, batch.slot_mapping, reads.long()], 1)


def table(max_num_seqs: int = 8, max_model_len: int = 5000) -> SlotTable:
    slots = SlotTable(max_num_seqs, max_model_len, BLOCK, torch.device("cpu"))
    for slot in range(max_num_seqs):
        length = 40 + slot
        blocks = tuple(range(1 + 4 * slot, 5 + 4 * slot))
        slots.fill(NewSeq(slot, tuple(range(100 * slot, 100 * slot + length)), length, PARAMS, 0, blocks))
    slots.last_token[:] = torch.arange(max_num_seqs) + 7000
    return slots


@pytest.mark.parametrize("slots_of_rows", [(3,), (0, 1), (5, 2, 7), tuple(range(8)), (6, 0, 1, 2, 5)])
def test_a_step_in_a_graph_is_the_step_filled_up(slots_of_rows):
    """The rows are those of the eager batch; what fills up writes to the null block and has no keys."""
    slots, eager, captured = table(), Batches(), Batches()
    graphs = Graphs(captured, slots, Recorder())
    rows = [Row(slot, 40 + slot if slot % 2 else 30, 1) for slot in slots_of_rows]  # drawn, or of the prompt
    expected = eager(slots.gather(rows, []))
    assert torch.equal(graphs.run(rows), expected)
    batch, count = captured.seen[-1], len(rows)
    assert batch.num_seqs == batch.num_tokens == graphs.shapes.least(count, 1).num_seqs == batch.short_seqs
    assert batch.cu_q.tolist() == list(range(batch.num_seqs + 1))
    assert batch.block_table.shape[1] * BLOCK == batch.max_seq_len == 2048
    assert batch.block_table.is_contiguous()
    for padding in (batch.slot_mapping, batch.seq_lens, batch.positions, batch.input_ids, batch.block_table):
        assert not padding[count:].any()


def test_what_an_earlier_step_left_in_the_inputs_reaches_nobody():
    slots, captured = table(), Batches()
    graphs = Graphs(captured, slots, Recorder())
    graphs.run([Row(slot, 40 + slot, 1) for slot in range(8)])
    few = [Row(slot, 40 + slot, 1) for slot in (0, 1, 2, 3, 4)]
    graphs.run(few)
    assert not captured.seen[-1].seq_lens[5:].any()
    assert not captured.seen[-1].slot_mapping[5:].any()


def test_a_shape_is_captured_when_it_is_first_needed_and_kept():
    slots, capture = table(), Recorder()
    graphs = Graphs(Batches(), slots, capture)
    graphs.capture_now(graphs.shapes.at_start())
    at_start = capture.captures
    assert graphs.captured[0] == graphs.shapes.largest == Shape(8, 5000)
    assert Shape(8, 2048) in graphs.captured
    short, long = [Row(0, 40, 1)], [Row(0, 3000, 1)]
    for rows in (short, short, long, long, short):
        graphs.run(rows)
    assert capture.captures == at_start + 1
    assert graphs.captured[-1] == Shape(1, 5000)
    assert capture.replays == 5


def test_a_shape_that_cannot_be_captured_runs_without(caplog):
    slots, capture = table(), Recorder(failing=(1,))
    graphs = Graphs(Batches(), slots, capture)
    one, two = [Row(0, 40, 1)], [Row(0, 40, 1), Row(1, 41, 1)]
    assert graphs.run(one) is None
    assert graphs.run(one) is None
    assert graphs.run(two) is not None
    assert capture.captures == 2
    assert "no graph for 1 sequences" in caplog.text


def test_at_the_start_a_failure_says_what_to_do():
    with pytest.raises(EngineStartError, match="--no-graphs"):
        Graphs(Batches(), table(), Recorder(failing=(2,))).capture_now([Shape(2, 2048), Shape(1, 2048)])


def test_the_persistent_inputs_stay_where_they_are():
    slots, captured = table(), Batches()
    graphs = Graphs(captured, slots, Recorder())
    graphs.run([Row(0, 40, 1)])
    graphs.run([Row(1, 41, 1), Row(2, 42, 1)])
    graphs.run([Row(3, 43, 1)])
    first, _, again = captured.seen
    assert np.array_equal(
        [t.data_ptr() for t in (first.positions, first.seq_lens, first.block_table)],
        [t.data_ptr() for t in (again.positions, again.seq_lens, again.block_table)],
    )


def test_only_steps_of_decodes_are_replayed(tiny_model: Path):
    core = EngineCore(EngineConfig(model=str(tiny_model), dtype="float32", threads=1, max_model_len=96))
    capture = Recorder()
    core.runner.graphs = Graphs(
        lambda batch: core.runner.decoder.forward(batch, core.runner.cache), core.runner.slots, capture
    )
    before = core.runner.eager_steps
    core.handle(AddRequest("a", [1, 2, 3, 4], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)))
    while core.has_work:
        core.step()
    stats = core.outputs([]).stats
    assert (stats.eager_steps_total - before, stats.graph_steps_total) == (1, 3)
    assert capture.replays == 3


def test_graphs_are_refused_where_there_are_none(tiny_model: Path):
    with pytest.raises(EngineStartError, match="graphs"):
        EngineCore(EngineConfig(model=str(tiny_model), device="cpu", graphs=True))
