"""Two tenants, one engine: `quire bench fairness`.

At the start one tenant, the flood, sends many long requests at once; the other, the visitor, sends short ones as a
Poisson process. Told is the visitor's 95th percentile of TTFT, alone and beside the flood, under each policy. Only
visits that were due while the flood was there count.

Simulated by a profile, live on an engine of this process, or (fairness_live.py) over HTTP.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from ..engine.messages import AddRequest
from ..scheduler.config import SchedulerConfig
from ..scheduler.params import Slo
from ..scheduler.scheduler import Scheduler
from ..scheduler.traces import arrival_times
from .hardware import read_profile
from .live import Clock, Engine, Session, Timeline, WallClock, greedy, prompt, start_engine
from .metrics import percentile
from .simulated import SimulatedEngine

POLICIES = ("strict_fcfs", "fcfs", "priority", "fair", "deadline")
FLOOD, VISITOR = "flood", "visitor"
FLOOD_PRIORITY = 10  # under `priority`; the visitor's is 0, which runs first whatever the flood has waited
VISITOR_TTFT = 0.5  # seconds, promised under `deadline`

SIMULATED_PREFILL_TOKENS = 256  # of a step beside streams: two tiles of the profiles' machines
SIMULATED_STEP_TOKENS = 512  # where nothing decodes, as the engine's default


@dataclass(frozen=True, slots=True, kw_only=True)
class FairnessConfig:
    """What to measure; names and meanings as on the command line.

    simulate            play the scheduler on a profile's clock
    profile             simulated machine: h100-8b, a100-7b, or a JSON file as `bench idealized --json` writes
    url                 live server, such as http://127.0.0.1:8000, with the policy it was started with. With neither,
                        an engine of this process is measured under every policy
    model, api_key      of the live server; model also of the engine of this process
    threads             of the engine of this process
    policies            any of POLICIES; strict_fcfs is fcfs to the letter, where short prompts overtake nobody
    flood_requests      sent at the start
    flood_prompt_len    tokens of each; None = three quarters of what the context leaves, at most 3072
    flood_output_len    tokens drawn for each
    visits              requests of the visitor
    visit_prompt_len    tokens of each; None = a quarter of the context, at most 512
    visit_output_len    tokens drawn for each
    visit_rate          visits a second on average
    max_num_prefill_tokens  prompt tokens of a step beside streams: a visit waits for the step that runs, and such steps
                        bound it. None = simulated 256, in this process the engine's default
    """

    simulate: bool = False
    profile: str = "h100-8b"
    url: str | None = None
    model: str | None = None
    api_key: str | None = None
    threads: int | None = None
    policies: tuple[str, ...] = POLICIES
    flood_requests: int = 100
    flood_prompt_len: int | None = None
    flood_output_len: int = 256
    visits: int = 60
    visit_prompt_len: int | None = None
    visit_output_len: int = 16
    visit_rate: float = 4.0
    max_num_prefill_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.simulate and self.url is not None:
            raise ValueError("choose one of --simulate (with --profile) and --url (a running server)")
        for policy in self.policies:
            if policy not in POLICIES:
                raise ValueError(f"--policies {policy}: choose of {', '.join(POLICIES)}")
        for name in (
            "flood_requests",
            "flood_prompt_len",
            "flood_output_len",
            "visits",
            "visit_prompt_len",
            "visit_output_len",
            "max_num_prefill_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if not self.visit_rate > 0:
            raise ValueError(f"--visit-rate {self.visit_rate}: must be above 0")


@dataclass(frozen=True, slots=True)
class Visit:
    """due: seconds after the flood; ttft: seconds, inf = it ended without a token."""

    due: float
    ttft: float


@dataclass(frozen=True, slots=True)
class Stay:
    """One run. flood_end: seconds until the flood was served; inf = it outlasted the visits."""

    visits: list[Visit]
    flood_end: float

    @property
    def p95_ttft_ms(self) -> float:
        """Of the visits during the flood; NaN if there was none."""
        return percentile([1e3 * visit.ttft for visit in self.visits if visit.due < self.flood_end], 95)

    @property
    def counted(self) -> int:
        return sum(visit.due < self.flood_end for visit in self.visits)


def flood_length(config: FairnessConfig, context: int) -> int:
    return config.flood_prompt_len or min((context - config.flood_output_len) * 3 // 4, 3072)


def visit_length(config: FairnessConfig, context: int) -> int:
    return config.visit_prompt_len or min(context // 4, 512)


def load(
    config: FairnessConfig, policy: str, vocab_size: int, context: int, flood: bool
) -> list[tuple[float, AddRequest]]:
    """(seconds, request): the visits, and before them the flood."""
    draw = random.Random(config.seed)
    promised = Slo(ttft=VISITOR_TTFT) if policy == "deadline" else Slo()
    requests = [
        (
            time,
            AddRequest(
                f"{VISITOR}-{i}",
                prompt(draw, visit_length(config, context), vocab_size),
                greedy(config.visit_output_len),
                tenant=VISITOR,
                slo=promised,
            ),
        )
        for i, time in enumerate(arrival_times(config.visits, config.visit_rate, seed=config.seed))
    ]
    if not flood:
        return requests
    priority = FLOOD_PRIORITY if policy == "priority" else 0
    length = flood_length(config, context)
    return [
        (
            0.0,
            AddRequest(
                f"{FLOOD}-{i}",
                prompt(draw, length, vocab_size),
                greedy(config.flood_output_len),
                tenant=FLOOD,
                priority=priority,
            ),
        )
        for i in range(config.flood_requests)
    ] + requests


def stay(engine: Engine, clock: Clock, requests: list[tuple[float, AddRequest]]) -> Stay:
    """Play until every visit has its first token."""
    session = Session(engine, clock)
    start = clock.now()
    visits = [request.request_id for _, request in requests if request.tenant == VISITOR]
    flood = {request.request_id for _, request in requests if request.tenant == FLOOD}
    flood_end = math.inf
    waiting = set(visits)

    def enough() -> bool:
        waiting.difference_update([i for i in waiting if (t := session.timelines.get(i)) and _answered(t)])
        return not waiting

    def on_end(request_id: str) -> None:
        nonlocal flood_end
        if request_id in flood:
            flood.remove(request_id)
            if not flood:
                flood_end = clock.now() - start

    session.play(requests, on_end, enough)
    timelines = [session.timelines[request_id] for request_id in visits]
    return Stay([Visit(t.due - start, t.ttft if t.token_times else math.inf) for t in timelines], flood_end)


def _answered(timeline: Timeline) -> bool:
    """With a token, or with its end, as when its time ran out."""
    return bool(timeline.token_times) or timeline.finish_reason is not None


def policy_settings(policy: str) -> tuple[str, float | None]:
    """(scheduling policy, overtaking; None = the default)."""
    return ("fcfs", 0.0) if policy == "strict_fcfs" else (policy, None)


# ---------------------------------------------------------------- simulated


def simulated(config: FairnessConfig) -> dict[str, Stay]:
    """Solo and per policy. Default settings of the engine, as far as a simulated machine has them."""
    profile = read_profile(config.profile)
    context = profile.max_model_len
    tokens = config.max_num_prefill_tokens or SIMULATED_PREFILL_TOKENS
    settings = SchedulerConfig(
        num_blocks=profile.num_blocks,
        block_size=profile.block_size,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=max(tokens, SIMULATED_STEP_TOKENS) + profile.max_num_seqs,
        max_num_prefill_tokens=tokens,
        max_model_len=context,
        prefix_caching=False,
    )

    def one(policy: str, flood: bool) -> Stay:
        name, overtaking = policy_settings(policy)
        chosen = replace(settings, policy=name)
        if overtaking is not None:
            chosen = replace(chosen, overtaking=overtaking)
        engine = SimulatedEngine(Scheduler(chosen, profile.cost), profile.cost)
        return stay(engine, engine, load(config, policy, 2, context, flood))

    return {"solo": one("fcfs", False)} | {policy: one(policy, True) for policy in config.policies}


# ---------------------------------------------------------------- live, in this process


def in_process(config: FairnessConfig) -> dict[str, Stay]:
    settings: dict[str, Any] = {
        "model": config.model or "bundled",
        "threads": config.threads,
        "prefix_caching": False,
    }
    if config.max_num_prefill_tokens is not None:
        settings["max_num_prefill_tokens"] = config.max_num_prefill_tokens

    def one(policy: str, flood: bool) -> Stay:
        name, overtaking = policy_settings(policy)
        chosen = settings if overtaking is None else settings | {"overtaking": overtaking}
        core = start_engine(scheduling_policy=name, **chosen)
        vocab_size, context = core.ready.vocab_size, core.ready.max_model_len
        few = replace(config, visits=4, visit_rate=100.0)
        stay(core, WallClock(), load(few, policy, vocab_size, context, False))  # first times
        return stay(core, WallClock(), load(config, policy, vocab_size, context, flood))

    return {"solo": one("fcfs", False)} | {policy: one(policy, True) for policy in config.policies}


# ---------------------------------------------------------------- reports


def run(config: FairnessConfig) -> dict[str, Any]:
    """Measure; the JSON. Raises ValueError (a setting or profile that cannot be), live also ServerError."""
    if config.url is not None:
        from .fairness_live import over_http

        stays = over_http(config)
    else:
        stays = simulated(config) if config.simulate else in_process(config)
    solo = stays.pop("solo").p95_ttft_ms
    settings = asdict(config)
    del settings["api_key"]
    return {
        "solo_p95_ttft_ms": solo,
        "flooded_p95_ttft_ms": {policy: found.p95_ttft_ms for policy, found in stays.items()},
        "flooded_over_solo": {policy: found.p95_ttft_ms / solo for policy, found in stays.items()},
        "visits_during_flood": {policy: found.counted for policy, found in stays.items()},
        "arrivals": f"Poisson, {config.visit_rate:g} visits/s",
        "config": settings,
    }


def table(result: dict[str, Any]) -> Table:
    config = result["config"]
    where = f"simulated {config['profile']}" if config["simulate"] else config["url"] or "engine of this process"
    shown = Table(
        "policy",
        "P95 TTFT ms",
        "over solo",
        "visits during the flood",
        title=f"visitor beside a flood of {config['flood_requests']} requests; {result['arrivals']}; {where}",
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    shown.add_row("alone", f"{result['solo_p95_ttft_ms']:.1f}", "1.00", "")
    for policy, ms in result["flooded_p95_ttft_ms"].items():
        ratio, count = result["flooded_over_solo"][policy], result["visits_during_flood"][policy]
        shown.add_row(policy, f"{ms:.1f}", f"{ratio:.2f}", f"{count} of {config['visits']}")
    return shown
