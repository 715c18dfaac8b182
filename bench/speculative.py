"""What speculation is worth: `quire bench speculative`.

    held-out prompts ──target──▶ contexts of its own ──rounds of every method and shape──▶ acceptance lengths
                                                      └─ chains that stop by the head ───▶ tokens per modelled second
    a costly twin of the target, one request and a full house ──with and without, in turn──▶ ratios of tokens a second

Rounds are played at the same contexts for all (rounds.py). The twin computes the target's function at the price of half
a billion parameters (costly_twin.py): what a draft is worth depends on what its target costs.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table

from ..engine.loader import locate_model
from ..engine.messages import AddRequest
from ..engine.spec.model import ModelProposer
from ..engine.spec.proposer import Proposer
from ..engine.tokenizer import load_tokenizer
from ..models.corpus import split_library
from ..scheduler.drafts import DraftShape, chain
from ..scheduler.params import SamplingParams, Speculative
from ..scheduler.step_time import StepShape
from .costly_twin import write_costly_twin
from .live import Session, start_engine
from .rounds import Round, Rounds

if TYPE_CHECKING:
    from ..engine.core import EngineCore

BUDGETS = (6, 10, 14, 21, 30)  # nodes of a tree, as in the paper on recursive speculative decoding
PROMPT_TOKENS, OWN_TOKENS = 128, 64  # of a context: read from the text, and at most written by the target
LONGEST_CHAIN = 20  # as in the paper on SpecDec++
GO_ON = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # beside what follows from the cost
# Rows of a step of the rounds: all nodes of some dozens of contexts at once.
STEP_TOKENS = 2048
# The full house: more requests than run at once, so that somebody always waits.
LOADED_SEQS, LOADED_REQUESTS = 32, 64
# What is guessed for the twin: in three rounds of eight requests 1.91 times as fast as none, chain:8 1.79, chain:4 1.72.
TWIN_SHAPE = "rsd-s:2x4"
# One after another: with four, whose tokens were easy to guess decided.
ALONE_REQUESTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """
    prompts        held-out texts that contexts are made of
    depth          tokens of the chains that methods are compared by
    rounds         played at every context for each shape
    output_len     tokens of each request of the timed runs
    repetitions    of the timed runs, with and without speculation in turn
    """

    threads: int | None = None
    prompts: int = 200
    depth: int = 6
    rounds: int = 4
    output_len: int = 96
    repetitions: int = 5
    seed: int = 0


# What guesses for the bundled target, by the name in the tables: fields of `EngineConfig`.
METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"speculative_method": "ngram"},
    "draft": {"speculative_method": "draft", "speculative_model": "bundled"},
    "nested h/2": {"speculative_method": "nested", "speculative_model": "h/2"},
    "nested h/4": {"speculative_method": "nested", "speculative_model": "h/4"},
    "nested h/8": {"speculative_method": "nested", "speculative_model": "h/8"},
    "layers 0,1,5,6": {"speculative_method": "layers", "speculative_model": "0,1,5,6"},
}
TEMPERATURES = (0.0, 1.0)


def run(config: SpeculativeConfig) -> dict[str, Any]:
    """Measure; the JSON."""
    torch.manual_seed(config.seed)
    prompts = held_out_prompts(config)
    result: dict[str, Any] = {"config": asdict(config)}
    contexts = {t: _contexts(config, prompts, t) for t in TEMPERATURES}
    lengths = {t: acceptance_lengths(config, contexts[t], t) for t in TEMPERATURES}
    result["acceptance_length"] = lengths[0.0]
    result["acceptance_length_sampled"] = lengths[1.0]
    result["equal_budget"] = equal_budgets(config, contexts[1.0])
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder)
        write_costly_twin(locate_model("bundled"), twin)
        result |= timed(config, str(twin), prompts)
    for name, t in (("stopping_sampled", 1.0), ("stopping", 0.0)):
        result[name] = stopping(config, contexts[t], t, result["draft_pass_over_step"])
    result["specdecpp_over_best_fixed"] = result["stopping_sampled"]["over_best_fixed"]
    return result


# ---------------------------------------------------------------- contexts


def held_out_prompts(config: SpeculativeConfig) -> list[list[int]]:
    """Pieces of modules that the bundled models never saw, each of another place."""
    tokenizer = load_tokenizer(str(locate_model("bundled")))
    split = split_library()
    texts = [tokenizer.encode(module.text) for module in (*split.held_out, *split.held_out_tests)]
    texts = [ids for ids in texts if len(ids) > PROMPT_TOKENS]
    draw = random.Random(config.seed)
    pieces = []
    for i in range(config.prompts):
        ids = texts[i % len(texts)]
        start = draw.randrange(len(ids) - PROMPT_TOKENS)
        pieces.append(ids[start : start + PROMPT_TOKENS])
    return pieces


def _contexts(config: SpeculativeConfig, prompts: Sequence[Sequence[int]], temperature: float) -> list[list[int]]:
    """Each prompt and a beginning of what the target goes on with, cut anywhere."""
    core = _engine(config)
    outputs = generate(core, prompts, OWN_TOKENS, temperature, config.seed)
    draw = random.Random(config.seed)
    return [[*ids, *out[: draw.randrange(len(out))]] for ids, out in zip(prompts, outputs, strict=True)]


def generate(
    core: EngineCore, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, seed: int
) -> list[list[int]]:
    """What the target itself says to each."""
    outputs: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, ids in enumerate(prompts):
        params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=seed + i, ignore_eos=True)
        core.handle(AddRequest(str(i), list(ids), params, speculative=Speculative(method="none")))
    while core.has_work:
        for chunk in core.step():
            outputs[chunk.request_id] += chunk.token_ids
    return list(outputs.values())


def _engine(config: SpeculativeConfig, **settings: Any) -> EngineCore:
    """Of the bundled model, in fp32: what is counted here is tokens, not time."""
    defaults: dict[str, Any] = {
        "threads": config.threads,
        "dtype": "float32",
        "max_num_seqs": config.prompts,
        "max_num_batched_tokens": max(STEP_TOKENS, config.prompts),
        "speculative_adaptive": False,
    }
    return start_engine(**defaults | settings)


# ---------------------------------------------------------------- acceptance


def acceptance_lengths(
    config: SpeculativeConfig, contexts: Sequence[Sequence[int]], temperature: float
) -> dict[str, float]:
    """Tokens of a round by method: accepted ones of a chain, and one more."""
    lengths = {}
    for name, settings in METHODS.items():
        core = _engine(config, **settings, num_speculative_tokens=config.depth)
        rounds, proposer = _rounds(core, settings["speculative_method"], contexts, config.depth)
        seeds = range(config.rounds if temperature else 1)
        played = [rounds.play(proposer, chain(config.depth), temperature, seed) for seed in seeds]
        lengths[name] = fmean(tokens for one in played for tokens in one.tokens)
    return lengths


def _rounds(core: EngineCore, method: str, contexts: Sequence[Sequence[int]], room: int) -> tuple[Rounds, Proposer]:
    """Ready to play; chains have the length that they are asked for, whatever a head says."""
    rounds, proposer = Rounds(core, contexts, room), core.runner.proposers[method]
    if isinstance(proposer, ModelProposer):
        proposer.head = None
    rounds.warm_up(proposer)
    return rounds, proposer


def equal_budgets(config: SpeculativeConfig, contexts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Tokens of a round by kind of tree, each kind in the best of all its shapes with so many nodes."""
    core = _engine(config, **METHODS["draft"], speculative_tree=f"chain:{max(BUDGETS)}")
    rounds, proposer = _rounds(core, "draft", contexts, max(BUDGETS))
    table = []
    for nodes in BUDGETS:
        row: dict[str, Any] = {"nodes": nodes}
        for kind in ("chain", "iid_tree", "rsd_c", "rsd_s"):
            means = {}
            for shape in shapes(kind, nodes):
                play = rounds.play_independent if kind == "iid_tree" else rounds.play
                played = [play(proposer, shape, 1.0, seed) for seed in range(config.rounds)]
                means[str(shape)] = fmean(tokens for one in played for tokens in one.tokens)
            row[f"{kind}_shape"] = max(means, key=means.__getitem__)
            row[kind] = means[row[f"{kind}_shape"]]
        table.append(row)
    return table


def shapes(kind: str, nodes: int) -> Iterator[DraftShape]:
    """All shapes of a kind with exactly so many nodes; of trees those with at least two levels and two branches."""
    if kind == "chain":
        yield chain(nodes)
        return
    if kind == "rsd_c":
        yield from (DraftShape("rsd-c", widths) for widths in _branchings(nodes, 1) if 1 < len(widths) < nodes)
        return
    for width in range(2, nodes // 2 + 1):
        if nodes % width == 0:
            yield DraftShape("rsd-s", (width,) * (nodes // width))


def _branchings(nodes: int, above: int, most: int | None = None) -> Iterator[tuple[int, ...]]:
    """Children per node and level, never more than on the level above, of trees with so many nodes."""
    if nodes == 0:
        yield ()
    for width in range(1, (nodes // above if most is None else min(most, nodes // above)) + 1):
        for rest in _branchings(nodes - above * width, above * width, width):
            yield (width, *rest)


# ---------------------------------------------------------------- stopping


def stopping(
    config: SpeculativeConfig, contexts: Sequence[Sequence[int]], temperature: float, cost: float
) -> dict[str, Any]:
    """Chains that stop by the acceptance head against the best of all fixed lengths, in tokens per modelled second.

    cost: of a pass of the draft model, in steps of the target. A chain of k guesses takes k passes. What all guesses of
    a chain must be worth for another is set as the scheduler does, from the best fixed length.
    """
    core = _engine(config, **METHODS["draft"], num_speculative_tokens=LONGEST_CHAIN)
    proposer = core.runner.proposers["draft"]
    assert isinstance(proposer, ModelProposer)
    head = proposer.head
    rounds, _ = _rounds(core, "draft", contexts, LONGEST_CHAIN)
    seeds = range(config.rounds if temperature else 1)

    def play(depth: int, go_on: float = 0.0) -> list[Round]:
        return [rounds.play(proposer, chain(depth), temperature, seed, go_on) for seed in seeds]

    def rate(played: Sequence[Round]) -> float:
        steps = sum(1 + cost * nodes for one in played for nodes in one.nodes)
        return sum(sum(one.tokens) for one in played) / steps

    lengths = {depth: play(depth) for depth in range(1, LONGEST_CHAIN + 1)}
    fixed = {depth: rate(played) for depth, played in lengths.items()}
    best = max(fixed, key=fixed.__getitem__)
    first = fmean(tokens > 1 for one in lengths[1] for tokens in one.tokens)  # how often one guess is right
    go_on = fixed[best] * cost / first
    proposer.head = head
    by_go_on = {value: rate(play(LONGEST_CHAIN, value)) for value in sorted({*GO_ON, go_on})}
    return {
        "fixed_tokens_per_step_time": fixed,
        "best_fixed_length": best,
        "go_on": go_on,
        "by_go_on": by_go_on,
        "over_best_fixed": by_go_on[go_on] / fixed[best],
    }


# ---------------------------------------------------------------- time


def timed(config: SpeculativeConfig, twin: str, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Tokens a second of the twin with adaptive speculation over those without, in turn: alone, and in a full house."""
    shared: dict[str, Any] = {"model": twin, "threads": config.threads, "dtype": "bfloat16", "prefix_caching": False}
    shared |= {"max_num_seqs": LOADED_SEQS, "max_num_batched_tokens": 512, "max_model_len": 512}
    engines = {
        "without": start_engine(**shared),
        "with": start_engine(**shared, **METHODS["draft"], speculative_tree=TWIN_SHAPE),
    }
    result: dict[str, Any] = {}
    for name, count, at_once in (("batch1", ALONE_REQUESTS, 1), ("batch32_loaded", LOADED_REQUESTS, LOADED_SEQS)):
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for repetition in range(config.repetitions + 1):
            for which, core in engines.items():
                speed = _speed(config, core, [prompts[i % len(prompts)] for i in range(count)], at_once, repetition)
                if repetition:  # the first one warms up
                    speeds[which].append(speed)
        ratios = [a / b for a, b in zip(speeds["with"], speeds["without"], strict=True)]
        result[name] = {which: median(values) for which, values in speeds.items()}
        result["speedup_batch1" if name == "batch1" else "ratio_batch32_loaded"] = median(ratios)
        result[f"{name}_ratios"] = ratios
        if name == "batch1":
            result["draft_pass_over_step"] = draft_pass_over_step(engines["with"])
    return result


def draft_pass_over_step(core: EngineCore) -> float:
    """What a pass of the draft model for one stream takes, in steps of the target without guesses, by the latest steps.

    To be asked when they had one stream: those of a full house say little of a level with one row.
    """
    scheduler = core.scheduler
    cost = scheduler.drafting.speculation.cost.of("draft")
    return (cost.a + cost.b) / scheduler.steps.cost.seconds(StepShape(1, PROMPT_TOKENS))


def _speed(
    config: SpeculativeConfig, core: EngineCore, prompts: Sequence[Sequence[int]], at_once: int, repetition: int
) -> float:
    """Output tokens a second, half of the requests greedy."""
    session = Session(core)
    waiting = [
        AddRequest(
            f"{repetition}-{i}",
            list(ids),
            SamplingParams(max_tokens=config.output_len, temperature=float(i % 2), seed=i, ignore_eos=True),
        )
        for i, ids in enumerate(prompts)
    ]
    first = [(0.0, waiting.pop()) for _ in range(at_once)]

    def follow(_: str) -> None:
        if waiting:
            session.send(waiting.pop())

    started = time.perf_counter()
    session.play(first, follow)
    tokens = sum(len(timeline.token_times) for timeline in session.timelines.values())
    return tokens / (time.perf_counter() - started)


def table(result: dict[str, Any]) -> Group:
    lengths = Table("method", "greedy", "temperature 1", title="Tokens of a round (chains)")
    for name, length in result["acceptance_length"].items():
        lengths.add_row(name, f"{length:.2f}", f"{result['acceptance_length_sampled'][name]:.2f}")
    kinds = ("chain", "iid_tree", "rsd_c", "rsd_s")
    budgets = Table("nodes", *kinds, title="Tokens of a round at temperature 1, by nodes (best shape)")
    for row in result["equal_budget"]:
        budgets.add_row(str(row["nodes"]), *(f"{row[kind]:.2f} ({row[f'{kind}_shape']})" for kind in kinds))
    speeds = Table("load", "without", "with", "ratio", title="Costly twin, output tokens/s")
    for name, key in (("batch1", "speedup_batch1"), ("batch32_loaded", "ratio_batch32_loaded")):
        speeds.add_row(name, f"{result[name]['without']:.1f}", f"{result[name]['with']:.1f}", f"{result[key]:.2f}")
    parts: list[Any] = [lengths, budgets, speeds]
    for name, text in (("stopping", "greedy"), ("stopping_sampled", "temperature 1")):
        got = result[name]
        parts.append(
            f"{text}: chains that go on from {got['go_on']:.2f} over the best fixed length {got['best_fixed_length']}: "
            f"{got['over_best_fixed']:.3f} (a draft pass is {result['draft_pass_over_step']:.4f} steps)"
        )
    return Group(*parts)
