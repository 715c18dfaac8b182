"""Do streams keep their pace while long prompts arrive? `quire bench slo`.

A few streams decode all the time; long prompts come in an open loop. The same load runs on two engines of one
process, in turn: Quire's scheduler, told the promised gap between two tokens, and the prefill-first discipline, under
which streams wait for whole prompts.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..engine.messages import AddRequest
from ..scheduler.traces import arrival_times
from .baselines import PrefillFirst
from .live import Session, Timeline, greedy, prompt, start_engine
from .metrics import percentile

if TYPE_CHECKING:
    from ..engine.core import EngineCore

SLO_STEPS = 4.0  # the promised gap where none is given, in decode steps of the streams alone
WARM_UP_TOKENS = 64  # of each stream: enough steps for a median, and for the engine to learn how long its steps take


@dataclass(frozen=True, slots=True, kw_only=True)
class SloConfig:
    """
    slo_itl_ms      promised gap between two tokens; None = four times the measured gap of the streams alone
    streams         sequences that decode all the time
    stream_prompt_len, stream_output_len   a stream that ends is followed by another
    prompts         long prompts of one measurement
    prompt_len      their length in tokens; None = seven eighths of the model's context
    load            share of the time that the long prompts would take an engine of their own
    repetitions     measurements of either engine, in turn
    """

    model: str = "bundled"
    threads: int | None = None
    slo_itl_ms: float | None = None
    streams: int = 8
    stream_prompt_len: int = 64
    stream_output_len: int = 512
    prompts: int = 40
    prompt_len: int | None = None
    load: float = 0.6
    repetitions: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("streams", "stream_prompt_len", "stream_output_len", "prompts", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not 0 < self.load < 1:
            raise ValueError(f"--load {self.load}: must lie between 0 and 1; from 1 on the queue only grows")
        if self.slo_itl_ms is not None and not self.slo_itl_ms > 0:
            raise ValueError(f"--slo-itl-ms {self.slo_itl_ms}: must be above 0")


class Load:
    """The load on one engine. Streams are named s…, long prompts p…; both are functions of the seed."""

    def __init__(self, core: EngineCore, config: SloConfig, seed: int) -> None:
        self.session = Session(core)
        self.config = config
        self.vocab_size = core.ready.vocab_size
        self.prompt_len = config.prompt_len or core.ready.max_model_len * 7 // 8
        self._draw = random.Random(seed)
        self._serial = 0

    def stream(self, output_len: int | None = None) -> AddRequest:
        self._serial += 1
        ids = prompt(self._draw, self.config.stream_prompt_len, self.vocab_size)
        return AddRequest(f"s{self._serial}", ids, greedy(output_len or self.config.stream_output_len))

    def long_prompt(self, number: int) -> AddRequest:
        return AddRequest(f"p{number}", prompt(self._draw, self.prompt_len, self.vocab_size), greedy(1))

    def alone(self) -> tuple[float, float]:
        """(median gap of the streams without prompts, time of a long prompt without streams), seconds."""
        self.session.play([(0.0, self.stream(WARM_UP_TOKENS)) for _ in range(self.config.streams)])
        gaps = [gap for t in self.session.timelines.values() for gap in t.itls]
        times = []
        for number in range(3):
            self.session.play([(0.0, self.long_prompt(number))])
            times.append(self.session.timelines[f"p{number}"].ttft)
        return median(gaps), median(times)

    def run(self, rate: float, seed: int) -> None:
        """Streams all the time, and long prompts at `rate` a second, until the last prompt has its first token."""
        count = self.config.prompts
        due = [(time, self.long_prompt(i)) for i, time in enumerate(arrival_times(count, rate, seed=seed))]
        streams = [(0.0, self.stream()) for _ in range(self.config.streams)]
        left = {request.request_id for _, request in due}

        def on_end(request_id: str) -> None:
            if request_id in left:
                left.remove(request_id)
            elif left:
                self.session.send(self.stream())

        self.session.play([*due, *streams], on_end, enough=lambda: not left)

    def figures(self) -> dict[str, float]:
        """P50 and P99 of the gaps inside streams while prompts came, and how the prompts fared."""
        streams: list[Timeline] = []
        prompts: list[Timeline] = []
        for request_id, timeline in self.session.timelines.items():
            (prompts if request_id.startswith("p") else streams).append(timeline)
        gaps = [1e3 * gap for timeline in streams for gap in timeline.itls]
        began, ended = min(t.due for t in prompts), max(t.token_times[0] for t in prompts)
        return {
            "p50_itl_ms": percentile(gaps, 50),
            "p99_itl_ms": percentile(gaps, 99),
            "max_itl_ms": max(gaps),
            "gaps": len(gaps),
            "p50_ttft_ms": 1e3 * median(t.ttft for t in prompts),
            "prefill_tok_s": sum(t.prompt_tokens for t in prompts) / (ended - began),
        }


def run(config: SloConfig) -> dict[str, Any]:
    """Measure; the JSON. Figures are medians over the repetitions."""
    first = start_engine(model=config.model, threads=config.threads, prefix_caching=False)
    step, prompt_seconds = Load(first, config, config.seed).alone()
    slo_ms = config.slo_itl_ms or 1e3 * SLO_STEPS * step
    rate = config.load / prompt_seconds
    whole = first.scheduler.config.max_model_len  # the tokens of the largest step that prefill-first takes
    baseline = _engine(config, slo_ms, max_num_batched_tokens=max(first.scheduler.config.max_num_batched_tokens, whole))
    engines = {"quire": _engine(config, slo_ms), "prefill_first": _prefill_first(baseline)}
    for core in engines.values():
        Load(core, config, config.seed).alone()  # warm
        Load(core, config, config.seed).run(rate, config.seed)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for repetition in range(config.repetitions):
        for name, core in engines.items():
            load = Load(core, config, config.seed + repetition)
            load.run(rate, config.seed + repetition)
            measured[name].append(load.figures())
    result: dict[str, Any] = {
        "slo_ms": slo_ms,
        "decode_step_ms": 1e3 * step,
        "prompt_alone_ms": 1e3 * prompt_seconds,
        "prompts_per_second": rate,
        "config": asdict(config),
    }
    for name, runs in measured.items():
        figures = {key: median(run[key] for run in runs) for key in runs[0]}
        result[name] = figures | {"p99_over_slo": figures["p99_itl_ms"] / slo_ms, "runs": runs}
    ratios = [a["p99_itl_ms"] / b["p99_itl_ms"] for a, b in zip(*measured.values(), strict=True)]
    result["p99_quire_over_prefill_first"] = median(ratios)
    return result


def _engine(config: SloConfig, slo_ms: float, **more: int) -> EngineCore:
    return start_engine(model=config.model, threads=config.threads, slo_itl_ms=slo_ms, prefix_caching=False, **more)


def _prefill_first(core: EngineCore) -> EngineCore:
    """The same engine under the other discipline, which promises nothing and takes a whole prompt in a step."""
    config = core.scheduler.config
    tokens = max(config.max_num_batched_tokens, config.max_model_len)
    core.scheduler = PrefillFirst(
        replace(config, slo_itl=None, max_num_batched_tokens=tokens, max_num_prefill_tokens=tokens),
        core.scheduler.steps.cost,
    )
    return core


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        "scheduler",
        "P50 ITL",
        "P99 ITL",
        "/ SLO",
        "longest",
        "P50 TTFT",
        "prompt tok/s",
        title=f"streams beside long prompts: SLO {result['slo_ms']:.1f} ms between two tokens",
        caption=(
            f"streams alone {result['decode_step_ms']:.2f} ms a token; a long prompt alone "
            f"{result['prompt_alone_ms']:.0f} ms, {result['prompts_per_second']:.2f} of them arrive a second"
        ),
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    for name in ("quire", "prefill_first"):
        row = result[name]
        shown.add_row(
            name.replace("_", "-"),
            f"{row['p50_itl_ms']:.2f} ms",
            f"{row['p99_itl_ms']:.2f} ms",
            f"{row['p99_over_slo']:.2f}",
            f"{row['max_itl_ms']:.0f} ms",
            f"{row['p50_ttft_ms']:.0f} ms",
            f"{row['prefill_tok_s']:.0f}",
        )
    return shown
