"""Which tile a matrix product takes: measured on this card (`quire tune`), else by rule.

    tile_for(op, rows, outputs, inputs, group, device) ──▶ tuned/<device>-<op>.json ──▶ there? the fastest that was met
                                                                                  └──▶ not there: default_tile(...)
    search(candidates(...), seconds) ──▶ the fastest tile                              what `quire tune` writes down

A tile depends on the shape and on the bucket that the number of rows falls in. Within a bucket a row's bits are the
same whatever other rows are computed with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "tuned"

# Numbers of rows that share a tile: up to the bucket's own, above the last one all.
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

MOST_SLICES = 16  # of the inputs; more is more partial sums to write and read than weights
FEW_ROWS = 16  # one tensor-core tile: below it the time is that of reading the weights


# Cards (first number of their compute capability) whose tensor cores read operands from shared memory, in tiles of 64
# rows or more, and have 227 KiB of it: Hopper (wgmma) and the B200 (tcgen05). Consumer Blackwell (12) is as Ampere.
WGMMA = (9, 10)


class Tile(NamedTuple):
    """rows x outputs of a product by one program, `inputs` at a time, the inputs cut in `slices` for as many programs.

    rows 0: dequantize the weight, then the library's product. warps and stages are Triton's.
    """

    rows: int
    outputs: int
    inputs: int
    slices: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """A product [rows, inputs] x [outputs, inputs]ᵀ; `group` inputs share a scale (inputs = all of them)."""

    rows: int
    outputs: int
    inputs: int
    group: int


class Card(NamedTuple):
    """A GPU's name, its multiprocessors, and the first number of its compute capability."""

    name: str
    processors: int
    major: int


H100 = Card("NVIDIA H100 80GB HBM3", 132, 9)
A100 = Card("NVIDIA A100-SXM4-80GB", 108, 8)
DENSE = Tile(0, 0, 0, 1, 0, 0)


def bucket(rows: int) -> int:
    """The number of rows that stands for `rows`."""
    return next((b for b in BUCKETS if rows <= b), BUCKETS[-1])


def tile_for(op: str, shape: Shape, device: torch.device) -> Tile:
    """The measured tile of this shape on this card, else the rule's."""
    return _tile_for(op, shape._replace(rows=bucket(shape.rows)), card(device))


@cache
def card(device: torch.device) -> Card:
    """What the tiles depend on of a device; for one that is no GPU, the card of the rules."""
    if device.type != "cuda":
        return H100._replace(name=device.type)
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.name, properties.multi_processor_count, properties.major)


@cache
def _tile_for(op: str, shape: Shape, card: Card) -> Tile:
    return read(FOLDER, card.name, op).get(shape) or default_tile(op, shape, card)


def clear() -> None:
    """Forget what was read, so that files written since are seen."""
    _tile_for.cache_clear()


def default_tile(op: str, shape: Shape, card: Card) -> Tile:
    """The rule. None of its tiles has been measured; `quire tune` measures.

    Up to 16 rows the tensor core's smallest tile, up to 64 one of wgmma's, above that two. On cards without those a
    thread holds the unpacked weights in registers, and 8 warps of 64 rows are what fits. Four-bit weights are unpacked
    first above 512 rows: 5 bytes written and read per weight, against 2 flops per weight and row for which the library
    does not have to unpack.
    """
    if op == "linear_int4" and shape.rows > 512:
        return DENSE
    inputs = step(op, shape)
    if shape.rows <= FEW_ROWS:
        # Programs that fit on a multiprocessor: by registers with four bits (128 each), by shared memory with eight.
        tile, resident = Tile(16, 128, inputs, 1, 4, 4), 4 if op == "linear_int4" else 3
    elif card.major not in WGMMA:
        tile, resident = Tile(64, 128, inputs, 1, 8, 3), 1
    elif shape.rows <= 64:
        tile, resident = Tile(64, 128, inputs, 1, 4, 3), 2
    else:
        tile, resident = Tile(128, 128, inputs, 1, 8, 3), 1
    return tile._replace(slices=_slices(tile, shape, resident * card.processors))


def step(op: str, shape: Shape) -> int:
    """Inputs of one iteration: a pack block, or 128, or fewer where a group is smaller.

    64 for many rows in 16 bits, of which 128 inputs would leave no room for a second program on a multiprocessor.
    """
    if op not in ("linear_int4", "linear_int8"):
        return 128
    most = 64 if op == "linear_int8" and shape.rows > FEW_ROWS else 128
    if shape.group == shape.inputs and op == "linear_int8":
        return most
    return next(n for n in (128, 64, 32) if n <= most and shape.group % n == 0)


def _slices(tile: Tile, shape: Shape, programs: int) -> int:
    """The most, in powers of two, that keep within `programs` and leave each slice four iterations."""
    tiles = -(-shape.rows // tile.rows) * -(-shape.outputs // tile.outputs)
    steps = -(-shape.inputs // tile.inputs)
    slices = 1
    while slices < MOST_SLICES and 2 * slices * tiles <= programs and steps >= 8 * slices:
        slices *= 2
    return slices


def candidates(op: str, shape: Shape, shared_bytes: int) -> Iterator[Tile]:
    """What is worth measuring: within the card's shared memory per program, and no slice without two iterations."""
    if op == "linear_int4" and shape.rows >= 128:
        yield DENSE
    inputs = step(op, shape)
    steps = -(-shape.inputs // inputs)
    most_rows = max(FEW_ROWS, min(128, shape.rows))
    for rows, outputs, warps, stages, slices in product(
        (16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 4), (1, 2, 4, 8, MOST_SLICES)
    ):
        sums = rows * outputs // (warps * 32)  # registers of a thread; 255 is all that it has
        fits = sums <= 128 and _shared(op, rows, outputs, inputs, stages) <= shared_bytes
        # Tiles of a quarter of the rows read the weights four times.
        if fits and most_rows // 4 <= rows <= most_rows and (slices == 1 or 2 * slices <= steps):
            yield Tile(rows, outputs, inputs, slices, warps, stages)


def _shared(op: str, rows: int, outputs: int, inputs: int, stages: int) -> int:
    """Bytes of shared memory: x and codes of every stage, and beside them weights that wgmma takes unpacked."""
    plain = op in ("linear_int4", "linear_int8")
    codes = outputs * inputs // (2 if op == "linear_int4" else 1)
    unpacked = 2 * outputs * inputs if plain and rows >= 64 else 0
    return stages * (rows * inputs * (2 if plain else 1) + codes) + unpacked


def search(tiles: Iterable[Tile], seconds: Callable[[Tile], float | None]) -> tuple[Tile, float]:
    """The tile of the least time and that time; of equals the first. None = this tile cannot run here.

    ValueError if none can.
    """
    best: tuple[Tile, float] | None = None
    for tile in tiles:
        time = seconds(tile)
        if time is not None and (best is None or time < best[1]):
            best = tile, time
    if best is None:
        raise ValueError("no tile can run on this card: give more shared memory, or a smaller shape")
    return best


def path_of(folder: Path, name: str, op: str) -> Path:
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{op}.json"


def read(folder: Path, name: str, op: str) -> dict[Shape, Tile]:
    """What was measured for an op on a card; {} where there is no file. ValueError names the file and the entry."""
    path = path_of(folder, name, op)
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        return {Shape(*map(int, key.split("x"))): Tile(*map(_count, tile)) for key, tile in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of tiles ({error}); measure again with `quire tune`") from error


def write(folder: Path, name: str, op: str, tiles: Mapping[Shape, Tile]) -> Path:
    """Add to what the file has; new measurements take the place of old ones."""
    path = path_of(folder, name, op)
    known = read(folder, name, op) | dict(tiles)
    table = {"device": name, "op": op, "tiles": {"x".join(map(str, s)): list(t) for s, t in sorted(known.items())}}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return path


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
