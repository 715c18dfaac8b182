"""Prompts packed against prompts padded, on one engine with the same kernels: `quire bench prefill`.

A layout is what a batch really computes. Every layout runs through the same engine, in turn, in one process:

    packed    all prompts at once; a step takes whole tokens of several prompts, up to max_num_batched_tokens
    padded    static batches: every prompt is as long as the longest of its batch
    sorted    the same, of prompts sorted by length, so that equals share a batch
    rows      rows as wide as the longest prompt, each holding several prompts (prepacking, arXiv 2404.09529), the
              rest of the row filled up

A pad is computed like any token. It is attended to where a static engine would mask it: other values, the same work.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..engine.messages import AddRequest
from ..scheduler.packing import pack_rows
from .live import greedy, prompt, start_engine

if TYPE_CHECKING:
    from ..engine.core import EngineCore

LENGTH_LAWS = ("log-uniform", "uniform")
LAYOUTS = ("packed", "padded", "sorted", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """
    num_prompts             prompts of one measurement
    min_len, max_len        their lengths in tokens, ends included
    lengths                 "log-uniform": as many prompts between 8 and 16 tokens as between 256 and 512; "uniform"
    batch_size              prompts of a padded batch
    sorted_batch_size       prompts of a length-sorted batch
    max_num_batched_tokens  tokens of one step, whatever the layout
    repetitions             measurements of each layout, in turn
    """

    model: str = "bundled"
    threads: int | None = None
    num_prompts: int = 64
    min_len: int = 8
    max_len: int = 512
    lengths: str = "log-uniform"
    batch_size: int = 64
    sorted_batch_size: int = 16
    max_num_batched_tokens: int = 512
    repetitions: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "min_len", "batch_size", "sorted_batch_size", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.max_len < self.min_len:
            raise ValueError(f"--max-len {self.max_len} is below --min-len {self.min_len}")
        if self.lengths not in LENGTH_LAWS:
            raise ValueError(f"--lengths {self.lengths!r}: choose {' or '.join(LENGTH_LAWS)}")


Layout = list[list[int]]  # batches that run one after another, each the lengths that it computes


def draw_lengths(config: PrefillConfig) -> list[int]:
    draw = random.Random(config.seed)
    low, high = config.min_len, config.max_len
    if config.lengths == "uniform":
        return [draw.randint(low, high) for _ in range(config.num_prompts)]
    # Of the integers, so that both ends come up: floor of a log-uniform in [low, high + 1).
    return [min(high, math.floor(low * ((high + 1) / low) ** draw.random())) for _ in range(config.num_prompts)]


def padded(lengths: Sequence[int], batch_size: int) -> Layout:
    """Static batches in the order given, each prompt as long as its batch's longest."""
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    return [[max(batch)] * len(batch) for batch in batches]


def in_rows(lengths: Sequence[int]) -> Layout:
    """One batch of rows as wide as the longest prompt; what a row has left is computed as a filler."""
    width = max(lengths)
    rows = [[segment.length for segment in row] for row in pack_rows(lengths, width)]
    fillers = [width - sum(row) for row in rows]
    return [[length for row in rows for length in row] + [filler for filler in fillers if filler]]


def layouts(config: PrefillConfig, lengths: Sequence[int]) -> dict[str, Layout]:
    return {
        "packed": [list(lengths)],
        "padded": padded(lengths, config.batch_size),
        "sorted": padded(sorted(lengths, reverse=True), config.sorted_batch_size),
        "rows": in_rows(lengths),
    }


@dataclass(slots=True)
class Run:
    seconds: float = 0.0
    computed: int = 0  # tokens
    launched: int = 0  # tokens, every step filled up to whole tiles


def launch(core: EngineCore, layout: Layout, draw: random.Random) -> Run:
    """Compute a layout to every prompt's first token."""
    run = Run()
    for number, batch in enumerate(layout):
        prompts = [prompt(draw, length, core.ready.vocab_size) for length in batch]
        started = time.perf_counter()
        for i, ids in enumerate(prompts):
            core.handle(AddRequest(f"{number}-{i}", ids, greedy(1), arrival=time.monotonic()))
        while core.has_work:
            core.step()
            run.computed += core.stats.step_tokens
            run.launched += core.stats.launched_tokens
        run.seconds += time.perf_counter() - started
    return run


def run(config: PrefillConfig) -> dict[str, Any]:
    """Measure; the JSON. `..._tok_s`: prompt tokens (pads do not count) a second, medians over the repetitions."""
    lengths = draw_lengths(config)
    forms = layouts(config, lengths)
    core = start_engine(
        model=config.model,
        threads=config.threads,
        max_num_seqs=max(len(batch) for layout in forms.values() for batch in layout),
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_prefill_tokens=config.max_num_batched_tokens,
        prefix_caching=False,
    )
    return measure(core, config, lengths, forms)


def measure(
    core: EngineCore, config: PrefillConfig, lengths: Sequence[int], forms: dict[str, Layout]
) -> dict[str, Any]:
    draw = random.Random(config.seed)
    for layout in forms.values():
        launch(core, layout, draw)  # first times: pages, caches, the step-time model
    runs: dict[str, list[Run]] = {name: [] for name in forms}
    for _ in range(config.repetitions):
        for name, layout in forms.items():
            runs[name].append(launch(core, layout, draw))
    useful = sum(lengths)
    result: dict[str, Any] = {"prompts": len(lengths), "prompt_tokens": useful, "config": asdict(config)}
    for name, measured in runs.items():
        result[f"{name}_tok_s"] = useful / median(r.seconds for r in measured)
        result[f"{name}_computed_tokens"] = measured[-1].computed
        result[f"{name}_useful_fraction"] = useful / measured[-1].launched
        ratios = [r.seconds / p.seconds for r, p in zip(measured, runs["packed"], strict=True)]
        result[f"packed_over_{name}"] = median(ratios)
    result["useful_fraction"] = result["packed_useful_fraction"]
    return result


def table(result: dict[str, Any]) -> Table:
    config = result["config"]
    shown = Table(
        "layout",
        "prompt tok/s",
        "packed is faster",
        "computed",
        "useful / launched",
        title=(
            f"{result['prompts']} prompts of {config['min_len']}..{config['max_len']} tokens, {config['lengths']}: "
            f"{result['prompt_tokens']} tokens"
        ),
        caption=(
            f"packed: steps of {config['max_num_batched_tokens']} tokens; padded: batches of {config['batch_size']}; "
            f"sorted: by length, batches of {config['sorted_batch_size']}; rows: of fixed width, several prompts each"
        ),
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    for name in LAYOUTS:
        shown.add_row(
            name,
            f"{result[f'{name}_tok_s']:.0f}",
            f"{result[f'packed_over_{name}']:.2f} ×",
            f"{result[f'{name}_computed_tokens']}",
            f"{result[f'{name}_useful_fraction']:.3f}",
        )
    return shown
