"""`quire bench kernels`: every compiled CPU kernel beside torch's operator for the same work and the machine's limits.

    registry ─ ops with an implementation "native" ─▶ WORK[op](format)(rows) ─▶ A and B in turn, medians ─▶ rows
    ceilings: what memory and products reach here, measured in the same run ───────────────────────────────────▲

The work is in kernel_work.py. A time is that of a call from Python, with what Python and torch add to it: some
microseconds, which decide at few rows of the small ops.

Ceilings are measured, not looked up. Memory: the fastest of some passes of torch's dot and matrix-vector products over
512 MiB. Products: the fastest of torch's own and ours at 2048 rows, outputs and inputs; both may be short of what the
processor has, and then a fraction is too good. A fraction above 1 tells of data that came from a cache.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..engine.families import load_config
from ..engine.loader import locate_model
from ..engine.resolve import look_at_machine, usable_threads
from ..kernels import Target, implementations, ops
from ..kernels.packed import PackedWeight, QuantizedRows
from ..kernels.testing import normal
from .kernel_work import BEYOND_CACHE, BF16, KV_OPS, WORK, Call, Shape, Subject, Work, formats, stored

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 64, 256, 1024)
CUBE = 2048  # rows, outputs and inputs of the product that is the machine's limit
PASSES = 8  # over what a ceiling is measured on
# Of one op, format and number of rows: seconds of a round of ours or of torch's, seconds of all rounds, and how many
# there are at least and at most. All rows of all ops take two minutes then.
BURST, BUDGET, ROUNDS = 0.005, 0.1, (3, 25)
MOST_CALLS = 200  # in a round
REST = 0.002  # seconds after which threads that wait for more work have gone to sleep


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsConfig:
    """rows: tokens of a step. ops: nothing = all. model: whose layers' shape is taken; None = `Shape`."""

    device: str = "cpu"
    threads: int | None = None
    rows: tuple[int, ...] = ROWS
    ops: tuple[str, ...] = ()
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Ceilings:
    gb_s: float
    bf16_tflop_s: float
    int8_tops: float

    def least_seconds(self, work: Work) -> float:
        """No machine with these limits does it in less."""
        peak = self.int8_tops if work.integers else self.bf16_tflop_s
        return max(work.nbytes / (1e9 * self.gb_s), work.operations / (1e12 * peak))


def run(config: KernelsConfig) -> dict[str, Any]:
    """{"threads": ..., "ceilings": ..., "rows": [...]}: a row per op, format and number of rows. ValueError for what
    cannot be.
    """
    if config.device != "cpu":
        raise ValueError(f"the device is {config.device!r}; a GPU's kernels are measured by bench/gpu_check.py")
    if not config.rows or min(config.rows) < 1:
        raise ValueError("rows are numbers from 1")
    shape = shape_of(config.model)
    names = chosen(config.ops, shape)
    before = torch.get_num_threads()
    threads = usable_threads(config.threads, look_at_machine("cpu").cores)
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            ceilings = measure_ceilings()
            figures = [row for name in names for row in measure(name, shape, config.rows, ceilings)]
    finally:
        torch.set_num_threads(before)
    return {"threads": threads, "ceilings": asdict(ceilings), "rows": figures}


def shape_of(model: str | None) -> Shape:
    if model is None:
        return Shape()
    config = load_config(locate_model(model))
    shape = Shape(config.hidden, config.ffn, config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size)
    if config.moe is None:
        return shape
    return replace(shape, experts=config.moe.num_experts, top_k=config.moe.top_k, expert_ffn=config.moe.ffn)


def served(op: str, shape: Shape) -> list[str]:
    """The formats that the compiled kernel of an op serves here."""
    return [format for format in formats(op) if _refusal(op, format, shape) is None]


def _refusal(op: str, format: str, shape: Shape) -> str | None:
    kernel = implementations(op).get("native")
    if kernel is None:
        return "there is none"
    return kernel.when(Target("cpu", BF16, shape.head_dim, format if op in KV_OPS else "bf16"))


def chosen(wanted: Sequence[str], shape: Shape) -> list[str]:
    """The ops to measure. ValueError for a wanted one that cannot be; of the others those are told that should be."""
    names = []
    for op in wanted or ops():
        why = None if op in WORK else "kernel_work.py has no work for it"
        if not served(op, shape):
            why = _refusal(op, formats(op)[0], shape)
        if why is None:
            names.append(op)
        elif wanted:
            raise ValueError(f"the compiled kernel of {op!r} cannot be measured: {why}")
        elif "native" in implementations(op):
            log.warning("the compiled kernel of %s is not measured: %s", op, why)
    if not names:
        raise ValueError("no compiled kernel runs here; `quire doctor` says why")
    return names


# ---- time


def measure_ceilings() -> Ceilings:
    """Of as many threads as torch has."""
    plane = torch.ones(BEYOND_CACHE // 4096 // 4, 4096)
    flat, vector = plane.flatten(), torch.ones(4096)
    memory = [fastest(lambda: flat.dot(flat)), fastest(lambda: plane @ vector)]
    operations = 2 * CUBE**3
    return Ceilings(
        gb_s=plane.nbytes / min(memory) / 1e9,
        bf16_tflop_s=operations / min(map(fastest, _bf16_products())) / 1e12,
        int8_tops=operations / min(map(fastest, _int8_products())) / 1e12,
    )


def _bf16_products() -> Iterator[Call]:
    x, weight = normal((CUBE, CUBE), BF16), normal((CUBE, CUBE), BF16, 1)
    yield lambda: F.linear(x, weight)
    yield from _our_product("linear", x, weight)


def _int8_products() -> Iterator[Call]:
    weight = stored("w8a8", CUBE, CUBE)
    assert isinstance(weight, PackedWeight)
    rows = QuantizedRows(weight.codes, torch.ones(CUBE, 1), BF16)
    yield lambda: torch._int_mm(rows.codes, weight.codes.T)
    yield from _our_product("linear_w8a8", rows, weight)


def _our_product(op: str, x: Any, weight: Any) -> Iterator[Call]:
    if served(op, Shape()):
        kernel = implementations(op)["native"]
        yield partial(kernel.run, x, kernel.prepare(weight, None))


def fastest(call: Call) -> float:
    return min(seconds([call]) for _ in range(PASSES))


def seconds(calls: Sequence[Call]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def measure(op: str, shape: Shape, rows: Sequence[int], ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    for format in served(op, shape):
        at = WORK[op](Subject(implementations(op)["native"], format, shape))
        for count in rows:
            work = at(count)
            ours, aten = medians(work)
            yield {
                "op": op,
                "format": format,
                "rows": count,
                "ms": 1e3 * ours,
                "gb_s": work.nbytes / ours / 1e9,
                "tflop_s": work.operations / ours / 1e12,
                "fraction_of_limit": ceilings.least_seconds(work) / ours,
                "aten_ms": None if aten is None else 1e3 * aten,
            }


def medians(work: Work) -> tuple[float, float | None]:
    """Seconds of a call of ours and of torch's: each the median over rounds in which both have their turn."""
    kinds = [itertools.cycle(calls) for calls in (work.calls, work.aten) if calls]
    bursts = []
    for calls in kinds:
        next(calls)()  # sets up what is set up once
        bursts.append(max(1, min(MOST_CALLS, int(BURST / seconds([next(calls)])))))
    rounds: list[list[float]] = []
    least, most = ROUNDS
    started = time.perf_counter()
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() - started < BUDGET):
        rounds.append([burst(calls, count) for calls, count in zip(kinds, bursts, strict=True)])
    ours, *aten = (statistics.median(column) for column in zip(*rounds, strict=True))
    return ours, aten[0] if aten else None


def burst(calls: Iterator[Call], count: int) -> float:
    """Seconds of one of so many calls, after the other kind's threads have left the cores and ours have come."""
    time.sleep(REST)
    if count > 1:
        next(calls)()
    return seconds(list(itertools.islice(calls, count))) / count


# ---- the table


def table(result: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    limits = result["ceilings"]
    shown = Table(
        title=f"{result['threads']} threads: {limits['gb_s']:.1f} GB/s, "
        f"{limits['bf16_tflop_s']:.2f} TFLOP/s in bf16, {limits['int8_tops']:.2f} TOP/s in int8",
        title_justify="left",
        caption="Times of a call from Python. Of the limit: what no machine with these ceilings can beat is 100 %, "
        "unless the data comes from a cache.",
        caption_justify="left",
    )
    for heading in ("op", "format"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("rows", "ms", "GB/s", "TFLOP/s", "of the limit", "torch, ms", "torch / ours"):
        shown.add_column(heading, justify="right")
    before = None
    for row in result["rows"]:
        kind = row["op"], row["format"]
        if before not in (None, kind):
            shown.add_section()
        aten = row["aten_ms"]
        shown.add_row(
            *(kind if kind != before else ("", "")),
            f"{row['rows']:,}",
            f"{row['ms']:.4f}",
            f"{row['gb_s']:.1f}",
            f"{row['tflop_s']:.2f}" if row["tflop_s"] else "",
            f"{row['fraction_of_limit']:.0%}",
            "" if aten is None else f"{aten:.4f}",
            "" if aten is None else f"{aten / row['ms']:.2f}",
        )
        before = kind
    return shown
