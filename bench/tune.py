"""Measures which tile each quantized product is fastest with on this GPU, for `kernels/tuned`.

    shapes of a model ──▶ for each op, shape, bucket of rows: search(candidates, seconds) ──▶ <card>-<op>.json

A tile is timed as the engine runs it, in a CUDA graph, on weights that are not in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels import tuning
from ..kernels.packed import weight_format, weight_formats
from ..kernels.tuning import Shape, Tile

OPS = tuple(f"linear_{name}" for name in weight_formats())

# (outputs, inputs) of the joined projections of Llama-3.1 8B and 70B.
USUAL_SHAPES = (
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (10240, 8192),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
)
REPLAYS = 7  # of a graph that goes through several copies of the weight; the median is taken


class NoGpu(Exception):
    """There is no GPU to measure on."""


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """What to measure. model: the folder of the model whose shapes they are, None = the usual ones; out: where to."""

    model: Path | None = None
    ops: tuple[str, ...] = OPS
    rows: tuple[int, ...] = tuning.BUCKETS
    out: Path = tuning.FOLDER


class Measured(NamedTuple):
    op: str
    shape: Shape
    tile: Tile
    seconds: float
    default_seconds: float | None  # of the tile that the rule takes


def run(config: TuneConfig, tell: Callable[[Measured], None]) -> list[Path]:
    """Measure, write, and give the files; what was measured is kept even where a later one fails.

    Raises NoGpu; ValueError names an unknown op or a number of rows that is no bucket.
    """
    import torch

    check(config)
    if not torch.cuda.is_available():
        raise NoGpu("there is no GPU here; `quire tune` measures on the one that will serve")
    card = tuning.card(torch.device("cuda", torch.cuda.current_device()))
    shared_bytes = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    shapes = USUAL_SHAPES if config.model is None else shapes_of(config.model)
    paths = []
    for op in config.ops:
        form = weight_format(op.removeprefix("linear_"))
        if torch.cuda.get_device_capability() < form.capability:
            continue
        for outputs, inputs in shapes:
            if form.refuses(outputs, inputs, form.group) is not None:
                continue
            measured = list(_measure(op, outputs, inputs, config.rows, card, shared_bytes, tell))
            paths.append(tuning.write(config.out, card.name, op, {m.shape: m.tile for m in measured}))
    tuning.clear()
    return sorted(set(paths))


def most_products(config: TuneConfig) -> int:
    """How many products are measured, if the card can do them all."""
    shapes = USUAL_SHAPES if config.model is None else shapes_of(config.model)
    return len(config.ops) * len(shapes) * len(config.rows)


def check(config: TuneConfig) -> None:
    if unknown := [op for op in config.ops if op not in OPS]:
        raise ValueError(f"--ops {unknown[0]}: unknown; choose from {', '.join(OPS)}")
    if other := [rows for rows in config.rows if rows not in tuning.BUCKETS]:
        raise ValueError(f"--rows {other[0]}: tiles are chosen for {', '.join(map(str, tuning.BUCKETS))} rows")


def shapes_of(model: Path) -> tuple[tuple[int, int], ...]:
    """(outputs, inputs) of every linear layer of a model, from its JSON. EngineStartError names what is wrong."""
    from ..engine.families import load_config
    from ..engine.layout import iter_weights, model_weights

    layers = model_weights(load_config(model)).layers
    return tuple(sorted({weight.shape for weight in iter_weights(layers) if weight.linear and len(weight.shape) == 2}))


def _measure(
    op: str,
    outputs: int,
    inputs: int,
    counts: Sequence[int],
    card: tuning.Card,
    shared_bytes: int,
    tell: Callable[[Measured], None],
) -> Iterator[Measured]:
    from .gpu_clock import copies_beyond_l2
    from .gpu_products import copied, random_weight

    name = op.removeprefix("linear_")
    first = random_weight(name, outputs, inputs)
    weights = [first, *(copied(first) for _ in range(copies_beyond_l2(first.nbytes) - 1))]
    module = _module(op)
    packed = [module.prepare(weight, None) for weight in weights]
    for rows in counts:
        shape = Shape(rows, outputs, inputs, first.group)
        seconds = partial(_seconds, module.multiply, _activations(name, first, rows), packed)
        tile, best = tuning.search(tuning.candidates(op, shape, shared_bytes), seconds)
        result = Measured(op, shape, tile, best, seconds(tuning.default_tile(op, shape, card)))
        tell(result)
        yield result


def _module(op: str) -> Any:
    from ..kernels.triton import linear_codes, linear_int4, linear_int8

    return {"linear_int4": linear_int4, "linear_int8": linear_int8}.get(op, linear_codes)


def _activations(name: str, weight: Any, rows: int) -> Any:
    """What `multiply` takes: in a model the norm before has quantized them already."""
    import torch

    from ..kernels.reference.rows import quantize_rows

    x = torch.randn(rows, weight.inputs, device="cuda", dtype=torch.bfloat16)
    to = weight_format(name).rows(weight)
    return x if to is None else quantize_rows(x, to)


def _seconds(multiply: Callable[..., Any], x: Any, packed: Sequence[Any], tile: Tile) -> float | None:
    """Of one product; None where the tile takes more than the card has, or the compiler does not manage it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from .gpu_clock import time_calls

    try:
        return time_calls([partial(multiply, x, each, tile) for each in packed], REPLAYS).seconds
    except (OutOfResources, CompilationError, PTXASError):
        return None
