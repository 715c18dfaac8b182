"""The step-time model's first fit: a few steps of chosen shapes, timed at the start, on the null block.

What is served later refines it (`scheduler/step_time.py`). Reading one block again and again is kinder to a cache than
real contexts are, so decodes with long contexts look cheaper here than they will turn out to be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from ..scheduler.plan import Row
from ..scheduler.step_time import StepCost, StepTimeModel, shape_of
from .resolve import Resolved

log = logging.getLogger(__name__)

# Rows that a matrix product is padded to: 16 are an AMX tile (kernels/cpu/linear.py), 64 the least that a GPU's matrix
# unit is full with.
TILE = {"cpu": 16, "cuda": 64}

REPEATS = 3  # of each shape; the model takes the median

# No shape is begun after so long: a model whose largest step takes seconds is timed on its smaller ones.
PATIENCE_SECONDS = 3.0


def calibrate(rehearse: Callable[[list[Row]], None], settings: Resolved, advance: Callable[[float], None]) -> StepCost:
    """The fitted cost of a step, in seconds.

    rehearse: runs such rows, and waits for them
    advance: told which part of the shapes is timed, 0 to 1
    """
    model = StepTimeModel(StepCost(TILE[settings.device.type], 1e-3, 1e-4, 1e-8, 1e-9))
    spent = 0.0
    shapes = list(_shapes(settings))
    for number, rows in enumerate(shapes):
        advance(number / len(shapes))
        shape = shape_of((row.start, row.num_tokens) for row in rows)
        if settings.device.type == "cuda":
            rehearse(rows)  # kernels are compiled and graphs captured when they are first needed
        for _ in range(REPEATS):
            before = time.perf_counter()
            rehearse(rows)
            seconds = time.perf_counter() - before
            model.observe(shape, seconds)
            spent += seconds
            if spent > PATIENCE_SECONDS:
                break
        if spent > PATIENCE_SECONDS:
            log.info("calibration stopped after %d tokens in a step", shape.num_tokens)
            break
    model.fit()
    return model.cost


def _shapes(settings: Resolved) -> Iterator[list[Row]]:
    """Steps from small to large: decodes with short and long contexts, prompts, and a chunk behind a long context."""
    longest = settings.max_model_len
    most = min(settings.max_num_batched_tokens, longest)
    seqs = min(settings.max_num_seqs, 16)
    for count in sorted({1, seqs}):
        for context in sorted({0, longest // 2}):
            yield [Row(slot, context, 1) for slot in range(count)]
    for tokens in sorted({min(most, 32), min(most, 128), most}):
        if tokens > 1:
            yield [Row(0, 0, tokens)]
            yield [Row(0, longest - tokens, tokens)]
