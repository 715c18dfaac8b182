"""How long would a request take on an engine of its own? `quire bench idealized`.

    T(p, o) = F(p) + Σ_{i<o} g(p + i)        F: prompt of p tokens to its first token, measured on a grid, between
                                                which it is linear
                                             g(context) = g0 + g1 · context: one more token

After Narayanan et al. (arXiv 2305.02440), whose g is a constant; at long contexts a token takes longer. The second half
lets the engine's own step-time model see batches of all kinds, and writes down what it learned: with the engine's
limits that is a profile for the simulator (`--profile FILE`).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from ..engine.messages import AddRequest
from .live import Session, greedy, prompt, start_engine

if TYPE_CHECKING:
    from ..engine.core import EngineCore

GRID = (1, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192)
CALIBRATION_SEQUENCES = (1, 4, 16, 64)
CALIBRATION_CONTEXTS = (1 / 16, 1 / 2)  # of the model's


@dataclass(frozen=True, slots=True, kw_only=True)
class IdealizedConfig:
    """
    output_len   tokens of every measured request: the largest o of the fit
    repetitions  requests per prompt length, of which the median counts
    """

    model: str = "bundled"
    threads: int | None = None
    output_len: int = 64
    repetitions: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.output_len < 2:
            raise ValueError(f"--output-len {self.output_len}: at least 2, or there is no time per token to fit")
        if self.repetitions < 1:
            raise ValueError(f"--repetitions {self.repetitions}: must be at least 1")


class Cell(NamedTuple):
    """A measured request: seconds to the o-th token."""

    prompt_tokens: int
    output_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Idealized:
    """T(p, o) in seconds; `prompts` ascending, `first` the F at each of them, never falling."""

    prompts: tuple[int, ...]
    first: tuple[float, ...]
    g0: float
    g1: float

    def first_token(self, prompt_tokens: int) -> float:
        """F, linear between the grid's lengths and with the outermost slopes beyond them."""
        if len(self.prompts) == 1:
            return self.first[0]
        i = min(max(bisect_right(self.prompts, prompt_tokens), 1), len(self.prompts) - 1)
        low, high = self.prompts[i - 1], self.prompts[i]
        share = (prompt_tokens - low) / (high - low)
        return max(0.0, self.first[i - 1] + share * (self.first[i] - self.first[i - 1]))

    def seconds(self, prompt_tokens: int, output_tokens: int) -> float:
        return self.first_token(prompt_tokens) + _decode_features(prompt_tokens, output_tokens, self.g0, self.g1)


def _decode_features(prompt_tokens: int, output_tokens: int, g0: float, g1: float) -> float:
    """Σ over tokens 2 .. o of g0 + g1 · (tokens before it)."""
    decodes = max(0, output_tokens - 1)
    return decodes * g0 + g1 * (decodes * prompt_tokens + decodes * (decodes + 1) / 2)


def never_falling(values: Sequence[float]) -> list[float]:
    """The nearest non-decreasing values in least squares: neighbours that fall become their mean (adjacent pooling).

    A longer prompt takes no less time; where it was measured so, that was noise.
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks.pop(), blocks.pop()
            blocks.append(((a * m + b * n) / (m + n), m + n))
    return [value for value, count in blocks for _ in range(count)]


def fit(cells: Sequence[Cell]) -> Idealized:
    """F from the cells with one output token, then g by least squares on what the others take beyond F.

    Raises ValueError without a cell of one token, or without a longer one, at some prompt length.
    """
    first: dict[int, float] = {c.prompt_tokens: c.seconds for c in cells if c.output_tokens == 1}
    decodes = [c for c in cells if c.output_tokens > 1]
    if not decodes or any(c.prompt_tokens not in first for c in decodes):
        raise ValueError("every prompt length needs its time for one token and for more")
    prompts = sorted(first)
    smooth = dict(zip(prompts, never_falling([first[p] for p in prompts]), strict=True))
    aa = ab = bb = ay = by = 0.0
    for p, o, seconds in decodes:
        a, b = _decode_features(p, o, 1.0, 0.0), _decode_features(p, o, 0.0, 1.0)
        y = seconds - first[p]
        aa, ab, bb, ay, by = aa + a * a, ab + a * b, bb + b * b, ay + a * y, by + b * y
    determinant = aa * bb - ab * ab
    g1 = (aa * by - ab * ay) / determinant if determinant > 1e-9 * aa * bb else 0.0
    g0 = (ay - g1 * ab) / aa
    return Idealized(tuple(prompts), tuple(smooth[p] for p in prompts), g0, g1)


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a fit tells the cells, first tokens included; R² = 1 - Σ error² / Σ (T - mean T)²."""

    r2: float
    mse: float  # seconds²
    max_error: float  # seconds
    mean_relative_error: float


def quality(model: Idealized, cells: Sequence[Cell]) -> Quality:
    errors = [model.seconds(c.prompt_tokens, c.output_tokens) - c.seconds for c in cells]
    mean = fmean(c.seconds for c in cells)
    spread = math.fsum((c.seconds - mean) ** 2 for c in cells)
    squares = math.fsum(e * e for e in errors)
    return Quality(
        r2=1 - squares / spread if spread else math.nan,
        mse=squares / len(cells),
        max_error=max(map(abs, errors)),
        mean_relative_error=fmean(abs(e) / c.seconds for e, c in zip(errors, cells, strict=True)),
    )


# ---------------------------------------------------------------- measuring


def measure(core: EngineCore, config: IdealizedConfig) -> list[Cell]:
    """Requests alone on the engine: one gives T(p, o) for every o at once, as the time of its o-th token.

    Lengths take turns, so that a slow moment of the machine meets all of them.
    """
    draw = random.Random(config.seed)
    longest = core.ready.max_model_len - config.output_len
    lengths = [p for p in GRID if p <= longest]
    if not lengths:
        raise ValueError(
            f"--output-len {config.output_len} leaves no prompt in a context of {core.ready.max_model_len}"
        )
    times: dict[int, list[list[float]]] = {p: [] for p in lengths}
    for repetition in range(config.repetitions + 1):
        for p in lengths:
            session = Session(core)
            ids = prompt(draw, p, core.ready.vocab_size)
            session.play([(0.0, AddRequest(f"{p}-{repetition}", ids, greedy(config.output_len)))])
            (timeline,) = session.timelines.values()
            if repetition:  # the first round is a warm-up
                times[p].append([time - timeline.due for time in timeline.token_times])
    return [
        Cell(p, o, median(run[o - 1] for run in times[p])) for p in lengths for o in range(1, config.output_len + 1)
    ]


def calibrate(core: EngineCore, config: IdealizedConfig) -> None:
    """Batches of every size at short and long contexts, with prompts that arrive while they decode."""
    draw = random.Random(config.seed)
    vocab, context = core.ready.vocab_size, core.ready.max_model_len
    for count in (n for n in CALIBRATION_SEQUENCES if n <= core.ready.max_num_seqs):
        for share in CALIBRATION_CONTEXTS:
            length = int(context * share)
            load = [(0.0, AddRequest(f"a{i}", prompt(draw, length, vocab), greedy(24))) for i in range(count)]
            Session(core).play([*load, (0.0, AddRequest("late", prompt(draw, length, vocab), greedy(2)))])


def run(config: IdealizedConfig) -> dict[str, Any]:
    """Measure and fit; the JSON, which is also a profile for the simulator."""
    core = start_engine(model=config.model, threads=config.threads, prefix_caching=False)
    cells = measure(core, config)
    model = fit(cells)
    calibrate(core, config)
    steps = core.scheduler.steps
    steps.fit()
    return {
        "prompt_tokens": list(model.prompts),
        "first_token_seconds": list(model.first),
        "g0_seconds": model.g0,
        "g1_seconds_per_token": model.g1,
        "cells": len(cells),
        **asdict(quality(model, cells)),
        "cost": steps.cost._asdict(),
        "step_time_error": steps.error,
        "num_blocks": core.ready.num_blocks,
        "block_size": core.ready.block_size,
        "max_num_seqs": core.ready.max_num_seqs,
        "max_model_len": core.ready.max_model_len,
        "config": asdict(config),
    }


def table(result: dict[str, Any]) -> Table:
    cost = result["cost"]
    shown = Table("prompt tokens", "F ms", title="T(p, o) = F(p) + Σ g(context), g = g0 + g1 · context")
    shown.caption = (
        f"g0 {1e3 * result['g0_seconds']:.3f} ms, g1 {1e6 * result['g1_seconds_per_token']:.3f} µs a token of context; "
        f"{result['cells']} cells: R² {result['r2']:.5f}, MSE {1e6 * result['mse']:.3f} ms², largest error "
        f"{1e3 * result['max_error']:.2f} ms, mean relative error {result['mean_relative_error']:.1%}\n"
        f"step-time model: base {1e3 * cost['base']:.3f} ms, {1e3 * cost['per_tile']:.3f} ms a tile of {cost['tile']}, "
        f"{1e6 * cost['per_context']:.3f} µs a token of decode context, {1e9 * cost['per_pair']:.3f} ns a pair; "
        f"mean relative error {result['step_time_error']:.1%}"
    )
    for column in shown.columns:
        column.justify = "right"
    for p, seconds in zip(result["prompt_tokens"], result["first_token_seconds"], strict=True):
        shown.add_row(str(p), f"{1e3 * seconds:.2f}")
    return shown
