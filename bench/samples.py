"""Many samples of one prompt, and what they are good for: `quire bench samples`.

First the price: n samples of one request, which compute and hold the prompt once, against n requests that share
nothing, on one engine, in turn. Then the worth: coverage of tasks by repeated samples (Brown et al., arXiv 2407.21787),
judged by programs.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from ..engine.messages import AddRequest
from ..engine.tokenizer import load_tokenizer
from ..scheduler.params import SamplingParams
from ..scheduler.plan import StepPlan
from .coverage import coverage, difficulty, fit_power_law, ladder
from .live import RequestFailed, prompt, start_engine
from .tasks import Task, example_tasks, parse_tasks

if TYPE_CHECKING:
    from ..engine.core import EngineCore

TASK_PROMPT_TOKENS = 1024  # of the text before a function's body; what is farther away is cut off
BLANK_LINE = b"\n\n"  # the library puts one behind every function: a sample ends there


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesConfig:
    """
    n                       samples of one prompt, and requests that are compared with them
    prompt_len, output_len  of each, in tokens
    max_num_seqs            sequences that run at once
    repetitions             measurements of both, in turn
    task_samples            samples of each task of the coverage study; 0 = no study
    parse_tasks             functions of the study that only have to parse
    task_tokens             tokens of a task's sample at most
    temperature, top_p      of the study; the defaults are the paper's
    """

    model: str = "bundled"
    threads: int | None = None
    n: int = 1000
    prompt_len: int = 1024
    output_len: int = 32
    max_num_seqs: int = 64
    repetitions: int = 3
    task_samples: int = 100
    parse_tasks: int = 30
    task_tokens: int = 64
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "prompt_len", "output_len", "max_num_seqs", "repetitions", "task_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("task_samples", "parse_tasks"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0")


def group_blocks(prompt_len: int, output_len: int, block_size: int, concurrent: int) -> int:
    """KV blocks of a group: its prompt once, and of each running sample what lies behind the prompt's full blocks.

    The last token drawn is never written.
    """
    own = -(-(prompt_len + output_len - 1) // block_size) - prompt_len // block_size
    return -(-prompt_len // block_size) + concurrent * own


# ---------------------------------------------------------------- the price


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    prompt_tokens: int  # computed
    peak_blocks: int  # held at once
    peak_running: int  # samples at once


@contextmanager
def watching(core: EngineCore, look: Callable[[StepPlan], None]) -> Iterator[None]:
    """Calls `look(plan)` for every step between its scheduling and its end, when it holds most."""
    schedule = core.scheduler.schedule

    def watched(now: float) -> StepPlan | None:
        plan = schedule(now)
        if plan is not None:
            look(plan)
        return plan

    core.scheduler.schedule = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        core.scheduler.schedule = schedule  # type: ignore[method-assign]


def complete(core: EngineCore, requests: Sequence[AddRequest]) -> dict[tuple[str, int], list[int]]:
    """(request id, sample index) -> its tokens. Raises RequestFailed."""
    drawn: dict[tuple[str, int], list[int]] = {}
    chunks = [chunk for request in requests for chunk in core.handle(request)]
    while True:
        for chunk in chunks:
            if chunk.finish_reason == "error":
                raise RequestFailed(f"sample {chunk.index} of {chunk.request_id} failed: {chunk.error}")
            drawn.setdefault((chunk.request_id, chunk.index), []).extend(chunk.token_ids)
        if not core.has_work:
            return drawn
        chunks = core.step()


def measure(core: EngineCore, requests: Sequence[AddRequest], samples: int, output_len: int) -> Run:
    blocks, running = [0], [0]

    def look(plan: StepPlan) -> None:
        blocks.append(core.scheduler.pool.num_used)
        running.append(len(core.scheduler.running))

    before = core.scheduler.counters.prompt_tokens
    started = time.perf_counter()
    with watching(core, look):
        drawn = complete(core, requests)
    seconds = time.perf_counter() - started
    if [len(tokens) for tokens in drawn.values()] != [output_len] * samples:
        raise RequestFailed(
            f"{samples} samples of {output_len} tokens were asked for; {len(drawn)} came, or not so long"
        )
    return Run(seconds, core.scheduler.counters.prompt_tokens - before, max(blocks), max(running))


def price(config: SamplesConfig) -> dict[str, Any]:
    core = start_engine(
        model=config.model,
        threads=config.threads,
        max_num_seqs=config.max_num_seqs,
        max_n=max(config.n, 1),
        prefix_caching=False,
    )
    ids = prompt(random.Random(config.seed), config.prompt_len, core.ready.vocab_size)
    params = SamplingParams(max_tokens=config.output_len, seed=config.seed, ignore_eos=True)

    def shared(n: int) -> list[AddRequest]:
        return [AddRequest("shared", ids, replace(params, n=n), arrival=time.monotonic())]

    def separate(n: int) -> list[AddRequest]:
        return [AddRequest(f"r{i}", ids, replace(params, seed=i), arrival=time.monotonic()) for i in range(n)]

    few = min(config.n, config.max_num_seqs)
    for requests in (shared(few), separate(few)):
        complete(core, requests)  # first times
    one: list[Run] = []
    many: list[Run] = []
    for _ in range(config.repetitions):
        one.append(measure(core, shared(config.n), config.n, config.output_len))
        many.append(measure(core, separate(config.n), config.n, config.output_len))
    tokens = config.n * config.output_len
    concurrent = min(config.n, config.max_num_seqs)
    return {
        "throughput_ratio": median(b.seconds / a.seconds for a, b in zip(one, many, strict=True)),
        "shared_tok_s": tokens / median(run.seconds for run in one),
        "separate_tok_s": tokens / median(run.seconds for run in many),
        "prompt_tokens_computed": one[-1].prompt_tokens,
        "separate_prompt_tokens_computed": many[-1].prompt_tokens,
        "peak_blocks": max(run.peak_blocks for run in one),
        "separate_peak_blocks": max(run.peak_blocks for run in many),
        "formula_blocks": group_blocks(config.prompt_len, config.output_len, core.ready.block_size, concurrent),
        "concurrent_samples": max(run.peak_running for run in one),
        "block_size": core.ready.block_size,
    }


# ---------------------------------------------------------------- the worth


def study(config: SamplesConfig) -> dict[str, Any]:
    """Coverage of both sets of tasks: {"parses": …, "passes_examples": …}."""
    core = start_engine(
        model=config.model, threads=config.threads, max_num_seqs=config.max_num_seqs, max_n=config.task_samples
    )
    verdicts: dict[str, tuple[list[Task], Callable[[Task, str], bool]]] = {
        "parses": (parse_tasks(config.parse_tasks, config.seed), Task.parses),
        "passes_examples": (example_tasks(), Task.passes),
    }
    result: dict[str, Any] = {}
    for name, (tasks, verdict) in verdicts.items():
        bodies = sample_bodies(core, tasks, config)
        outcomes = [judge(task, drawn, verdict) for task, drawn in zip(tasks, bodies, strict=True)]
        if outcomes:
            result[name] = summary(tasks, outcomes)
    return result


def sample_bodies(core: EngineCore, tasks: Sequence[Task], config: SamplesConfig) -> list[list[str]]:
    """`config.task_samples` bodies for each task."""
    tokenizer = load_tokenizer(core.ready.model_path)
    stops = tuple(i for i in range(tokenizer.vocab_size) if BLANK_LINE in tokenizer.token_bytes(i))
    params = SamplingParams(
        max_tokens=config.task_tokens,
        n=config.task_samples,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        stop_token_ids=stops,
    )
    requests = [
        AddRequest(str(i), tokenizer.encode(task.prompt)[-TASK_PROMPT_TOKENS:], params, arrival=time.monotonic())
        for i, task in enumerate(tasks)
    ]
    drawn = complete(core, requests)
    return [
        [task.body(_text(tokenizer, drawn[str(i), index])) for index in range(config.task_samples)]
        for i, task in enumerate(tasks)
    ]


def _text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    data = b"".join(tokenizer.token_bytes(i) for i in token_ids if i not in tokenizer.special_ids)
    return data.split(BLANK_LINE)[0].decode("utf-8", "replace")


def judge(task: Task, bodies: Sequence[str], verdict: Callable[[Task, str], bool]) -> tuple[int, int]:
    """(samples, right ones); equal bodies are judged once."""
    different = list(dict.fromkeys(bodies))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads that wait for sandboxes
        right = dict(zip(different, pool.map(lambda body: verdict(task, body), different), strict=True))
    return len(bodies), sum(right[body] for body in bodies)


def summary(tasks: Sequence[Task], outcomes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    samples = outcomes[0][0]
    curve = [(k, coverage(outcomes, k)) for k in ladder(samples)]
    law = fit_power_law(curve)
    return {
        "tasks": len(tasks),
        "samples": samples,
        "coverage": {str(k): c for k, c in curve},
        "power_law": None if law is None else asdict(law),
        "difficulty": asdict(difficulty(outcomes)),
        "right": {f"{task.module}:{task.name}": right for task, (_, right) in zip(tasks, outcomes, strict=True)},
    }


# ---------------------------------------------------------------- together


def run(config: SamplesConfig) -> dict[str, Any]:
    """Measure; the JSON."""
    result = price(config)
    if config.task_samples:
        result["coverage"] = study(config)
    return result | {"config": asdict(config)}


def table(result: dict[str, Any]) -> Group:
    config = result["config"]
    n = config["n"]
    shown = Table(
        "",
        "tokens/s",
        "prompt tokens computed",
        "peak KV blocks",
        title=f"{n} samples of a prompt of {config['prompt_len']} tokens, {config['output_len']} tokens each",
        caption=(
            f"one request is faster by {result['throughput_ratio']:.2f} ×; {result['formula_blocks']} blocks by the "
            f"formula for {result['concurrent_samples']} samples at once, blocks of {result['block_size']}"
        ),
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    for title, prefix, tokens in (("one request", "shared", ""), (f"{n} requests", "separate", "separate_")):
        shown.add_row(
            title,
            f"{result[f'{prefix}_tok_s']:.0f}",
            str(result[f"{tokens}prompt_tokens_computed"]),
            str(result[f"{tokens}peak_blocks"]),
        )
    return Group(shown, *(coverage_table(name, part) for name, part in result.get("coverage", {}).items()))


def coverage_table(name: str, part: dict[str, Any]) -> Table:
    shown = Table(title=f"{name.replace('_', ' ')}: {part['tasks']} held-out functions, {part['samples']} samples each")
    for k in part["coverage"]:
        shown.add_column(f"k={k}", justify="right")
    shown.add_row(*(f"{c:.3f}" for c in part["coverage"].values()))
    law, spread = part["power_law"], part["difficulty"]
    fitted = f"log c = {law['a']:.2f} k^{law['b']:.2f}, R² {law['r2']:.3f}" if law else "no power law to fit"
    shown.caption = (
        f"{fitted}; a sample is right with p = {spread['p10']:.2f} / {spread['p50']:.2f} / {spread['p90']:.2f} "
        f"(P10 / P50 / P90 of tasks), {spread['never']:.0%} of tasks never"
    )
    return shown
