"""CUDA graphs: the forward pass of a step of decodes as one launch.

    rows ─▶ the least shape that holds them ─▶ padded arrays ──one copy──▶ persistent inputs ─▶ replay ─▶ hidden
                   │ not captured yet                                            ▲
                   └──▶ capture(forward on views of the persistent inputs) ──────┘

A step of few rows is bound by the host that launches its hundreds of kernels; a graph launches them at once. It repeats
to the letter what was captured, so it is captured for a shape, on inputs that stay where they are. What fills a step up
to its shape are sequences of one row without keys: they write to the null block and nobody reads what they give.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.batch import RaggedBatch
from ..scheduler.plan import Row
from .errors import EngineStartError
from .slots import KNOWN, SlotTable
from .transfer import Field, buffer_size, staging, views

log = logging.getLogger(__name__)

Forward = Callable[[RaggedBatch], Tensor]
Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]

# The shortest context that shapes tell apart, in tokens, and the factor to the next: attention's grid is made for the
# longest sequence that a shape admits, and the part of it that a step does not need ends at once.
CONTEXT, CONTEXT_FACTOR = 2048, 4

# Captured before anything is served. It bounds the start; with 64 sequences it is all of the shortest contexts.
AT_START = 12


class Shape(NamedTuple):
    """Of a step of sequences with one row each: how many, and the tokens of the longest."""

    num_seqs: int
    context: int


class Shapes:
    """What steps are filled up to. Sequences: 1, 2, 4, 8, by eights to 64, then at most a quarter more than needed."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        seqs = [1, 2, 4, 8]
        while seqs[-1] < max_num_seqs:
            seqs.append(seqs[-1] + max(8, 1 << (seqs[-1].bit_length() - 3)))
        contexts = [CONTEXT]
        while contexts[-1] < max_model_len:
            contexts.append(contexts[-1] * CONTEXT_FACTOR)
        self.seqs = sorted({min(count, max_num_seqs) for count in seqs})
        self.contexts = sorted({min(context, max_model_len) for context in contexts})
        self.largest = Shape(max_num_seqs, max_model_len)

    def least(self, num_seqs: int, context: int) -> Shape:
        """The smallest that holds so many sequences, of at most so many tokens."""
        return Shape(
            self.seqs[bisect_left(self.seqs, num_seqs)],
            self.contexts[bisect_left(self.contexts, context)],
        )

    def all(self) -> list[Shape]:
        """The largest first."""
        return [Shape(count, context) for context in reversed(self.contexts) for count in reversed(self.seqs)]

    def at_start(self) -> list[Shape]:
        """What to capture first: the largest, whose memory the others fit into, then short contexts and few sequences,
        which gain the most; in falling size."""
        shorts = [Shape(count, self.contexts[0]) for count in self.seqs[: AT_START - 1]]
        return [shape for shape in self.all() if shape == self.largest or shape in shorts]


class Graphs:
    """Captured forward passes, by shape."""

    def __init__(self, forward: Forward, slots: SlotTable, capture: Capture) -> None:
        """forward: of a batch, to hidden rows [T, d]; it must not wait for the device, nor look at what is on it."""
        self.shapes = Shapes(slots.max_num_seqs, slots.max_model_len)
        self._forward, self._slots, self._capture = forward, slots, capture
        size = buffer_size(self._fields(self.shapes.largest))
        self._inputs = torch.zeros(size, dtype=torch.uint8, device=slots.device)
        self._replays: dict[Shape, Replay | None] = {}  # None: it could not be captured

    @property
    def captured(self) -> list[Shape]:
        """In the order of their capture."""
        return [shape for shape, replay in self._replays.items() if replay is not None]

    @torch.inference_mode()
    def capture_now(self, shapes: Sequence[Shape], advance: Callable[[float], None] = lambda done: None) -> None:
        """Capture these, before anything is served. Raises EngineStartError.

        advance: told which part of them is captured, 0 to 1.
        """
        for number, shape in enumerate(shapes):
            advance(number / len(shapes))
            self._fill(shape, ())
            try:
                self._replays[shape] = self._capture(self._captured(shape))
            except Exception as error:
                raise EngineStartError(
                    f"a CUDA graph for {shape.num_seqs} sequences cannot be captured ({error}); "
                    "start with graphs off (--no-graphs), or give the KV cache less memory"
                ) from error

    def run(self, rows: Sequence[Row]) -> Tensor | None:
        """Hidden states [len(rows), d] of rows of one token, valid until the next run; None where there is no graph."""
        shape = self.shapes.least(len(rows), max(row.start for row in rows) + 1)
        self._fill(shape, rows)
        if shape not in self._replays:
            self._replays[shape] = self._try_capture(shape)
        replay = self._replays[shape]
        return None if replay is None else replay()[: len(rows)]

    def _try_capture(self, shape: Shape) -> Replay | None:
        try:
            return self._capture(self._captured(shape))
        except Exception:
            log.exception("no graph for %d sequences of %d tokens: such steps run without", *shape)
            return None

    def _fields(self, shape: Shape) -> list[Field]:
        """The inputs: those of a RaggedBatch in their order, and the rows' sources."""
        count, blocks = shape.num_seqs, -(-shape.context // self._slots.block_size)
        long, short = torch.int64, torch.int32
        return [
            ((count,), long),
            ((count,), long),
            ((count,), long),
            ((count + 1,), short),
            ((count,), short),
            ((count, blocks), short),
            ((count,), long),
        ]

    def _fill(self, shape: Shape, rows: Sequence[Row]) -> None:
        """Put the rows, and what fills them up, into the persistent inputs."""
        fields = self._fields(shape)
        stage = staging(buffer_size(fields), self._slots.device)
        *batch, cu_q, seq_lens, table, sources = (view.numpy() for view in views(stage, fields))
        cu_q[:] = np.arange(shape.num_seqs + 1)
        sources[:] = KNOWN
        if rows:
            step, count = self._slots.lay_out(rows), len(rows)
            layout = step.layout
            for view, array in zip(batch, (step.input_ids, layout.positions, layout.slot_mapping), strict=True):
                view[:count] = array
            seq_lens[:count] = layout.seq_lens
            table[:count, : layout.block_table.shape[1]] = layout.block_table
            sources[:count] = step.sources
        self._inputs[: len(stage)].copy_(stage, non_blocking=True)

    def _captured(self, shape: Shape) -> Callable[[], Tensor]:
        """The forward pass on the persistent inputs, as this shape lays them out."""
        input_ids, *rest, sources = views(self._inputs, self._fields(shape))
        logit_rows = torch.arange(shape.num_seqs, device=self._inputs.device)

        def run() -> Tensor:
            drawn = self._slots.last_token.index_select(0, sources.clamp_min(0))
            batch = RaggedBatch(
                torch.where(sources == KNOWN, input_ids, drawn),
                *rest,
                tree_mask=None,
                logit_rows=logit_rows,
                max_q=1,
                max_seq_len=shape.context,
                short_seqs=shape.num_seqs,
            )
            return self._forward(batch)

        return run


class CudaCapture:
    """Records what a function launches. All graphs share one pool: they run one after another."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        # Once as it is, on the stream of the capture: kernels are compiled and libraries take their workspaces there.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Of other threads' work on the device nothing is recorded, and it is not forbidden meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            hidden = function()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay
