"""How many requests a second can be served within a latency objective? `quire bench capacity`.

Capacity is the highest Poisson rate at which the 99th percentile of the time between tokens (TBT, pooled over all
tokens of all requests) is within the objective, and the median scheduling delay (arrival to first step) within two
seconds: the metric of Sarathi-Serve (arXiv 2403.02310, section 5). It is found by doubling and bisection.

Simulated, the same requests in the same order go to every system, whose steps take as long as the profile says; live,
they go to one server over HTTP (capacity_live.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from ..scheduler.config import SchedulerConfig
from ..scheduler.scheduler import Scheduler
from ..scheduler.simulate import Simulation
from ..scheduler.traces import LAWS, Arrival, arrival_times, at_rate, draw_lengths, read_trace, synthetic
from .baselines import DecodeFirst, PrefillFirst, StaticBudget
from .hardware import Profile, read_profile
from .metrics import percentile

SYSTEMS = ("prefill_first", "decode_first", "static_512", "static_1024", "static_2048", "quire")

# The published protocol: the objective in units of a pure decode step, its percentile, and the bound on the delay.
OBJECTIVES = {"strict": 5.0, "relaxed": 25.0}
TBT_PERCENTILE = 99
MAX_DELAY = 2.0  # seconds

TOLERANCE = 0.025  # of the rate, where bisection ends
GROWTH = 1.5
MAX_TRIALS = 20
LEAST_SHARE = 1 / 64  # of the first rate: whatever cannot serve that has no capacity
FIRST_LOAD = 0.8  # of what the profile could compute, in the first simulated trial

LOOK = 1024  # simulated steps between looks at whether a trial can still pass


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityConfig:
    """What to search; names and meanings as on the command line.

    simulate           play the scheduler on a profile's clock; else load the server at `url`
    profile            simulated machine: h100-8b, a100-7b, or a JSON file as `bench idealized --json` writes
    url                live server, such as http://127.0.0.1:8000
    model, api_key     of the live server; None = the model it has
    trace              lengths of sharegpt or arxiv with Poisson arrivals, or a JSON-lines file whose own arrivals are
                       played faster or slower
    slo                objective for the time between tokens: strict or relaxed (5 or 25 pure decode steps), or
                       milliseconds. A live server's needs milliseconds
    num_requests       of one trial; a file's first so many
    max_trial_seconds  live: arrivals of one trial end then, whatever num_requests is
    start_rate         requests a second of the first trial; None = 0.8 of what the profile could compute, live 1
    systems            simulated: any of SYSTEMS
    overtaking         simulated: of quire, as in EngineConfig; None = its default
    noise              simulated: standard deviation of the logarithm of a step's time about the profile's
    jobs               simulated: systems searched at once, each in a process of its own
    seed               of arrivals, lengths and noise
    """

    simulate: bool = False
    profile: str = "h100-8b"
    url: str | None = None
    model: str | None = None
    api_key: str | None = None
    trace: str = "sharegpt"
    slo: str = "strict"
    num_requests: int = 2048
    max_trial_seconds: float = 1800.0
    start_rate: float | None = None
    systems: tuple[str, ...] = SYSTEMS
    overtaking: float | None = None
    noise: float = 0.0
    jobs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.simulate == (self.url is not None):
            raise ValueError("choose one of --simulate (with --profile) and --url (a running server)")
        for name, least in (("num_requests", 2), ("jobs", 1), ("noise", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        for name in ("max_trial_seconds", "start_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        for system in self.systems:
            if system not in SYSTEMS:
                raise ValueError(f"--systems {system}: choose of {', '.join(SYSTEMS)}")
        if self.url is not None and self.slo in OBJECTIVES:
            raise ValueError(f"--slo {self.slo} is a multiple of a profile's step; for a server give milliseconds")
        self.slo_seconds(None)

    @property
    def most_rate(self) -> float:
        """Above it a trial's requests all come within the delay that is allowed: nothing can be learnt from it."""
        return self.num_requests / MAX_DELAY

    def slo_seconds(self, profile: Profile | None) -> float:
        """The objective in seconds; without a profile, 0 for one that is relative to it."""
        if self.slo in OBJECTIVES:
            return OBJECTIVES[self.slo] * profile.reference_seconds if profile else 0.0
        try:
            seconds = float(self.slo) / 1000
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise ValueError(f"--slo {self.slo}: give strict, relaxed or milliseconds above 0")
        return seconds


@dataclass(frozen=True, slots=True)
class Trial:
    """One load at one rate. Times in seconds; what a trial given up early did not come to know is NaN.

    delay_*   arrival to first step; of a live server see `delay_from` in the result
    useful    tokens over tokens launched, padding to whole tiles included
    """

    rate: float
    passed: bool
    requests: int
    tbt_p50: float = math.nan
    tbt_p99: float = math.nan
    delay_p50: float = math.nan
    delay_p99: float = math.nan
    ttft_p50: float = math.nan
    ttft_p99: float = math.nan
    step_tokens: float = math.nan
    useful: float = math.nan
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """All trials of one system, in their order."""

    system: str
    trials: list[Trial]

    @property
    def best(self) -> Trial | None:
        return max((trial for trial in self.trials if trial.passed), key=lambda trial: trial.rate, default=None)

    @property
    def capacity(self) -> float:
        """Requests a second; 0 when no rate passed."""
        return self.best.rate if self.best else 0.0

    @property
    def bounded(self) -> bool:
        """Whether a higher rate failed. If none did, a trial has too few requests to overload the system."""
        return any(trial.rate > self.capacity for trial in self.trials)


@dataclass(frozen=True, slots=True)
class Result:
    """delay_from: "first step" (simulated), or how a live server's scheduling delay was learnt."""

    config: CapacityConfig
    slo: float
    found: list[Found]
    delay_from: str

    @property
    def capacities(self) -> dict[str, float]:
        return {found.system: found.capacity for found in self.found}


Progress = Callable[[str, Trial], None]


def search(trial: Callable[[float], Trial], start: float, most: float = math.inf) -> list[Trial]:
    """Trials at rates from `start` to `most`: by GROWTH until one passes and one fails, then between them.

    Ends when they are TOLERANCE apart. What passes at a rate is taken to pass below it.
    """
    trials: list[Trial] = []
    start = min(start, most)
    low, high, rate = 0.0, math.inf, start
    while len(trials) < MAX_TRIALS and start * LEAST_SHARE <= rate <= most and high > low * (1 + TOLERANCE):
        trials.append(trial(rate))
        if trials[-1].passed:
            low = rate
        else:
            high = rate
        if not low:
            rate = high / GROWTH
        elif math.isinf(high):
            rate = low * GROWTH
        else:
            rate = math.sqrt(low * high)
    return trials


def run(config: CapacityConfig, progress: Progress = lambda system, trial: None) -> Result:
    """Search. Raises ValueError (a setting, a profile or a trace that cannot be), live also ServerError."""
    if config.url is not None:
        from .capacity_live import LiveServer

        server = LiveServer(config)

        def timed(rate: float) -> Trial:
            trial = server.trial(rate)
            progress("server", trial)
            return trial

        found = [Found("server", search(timed, config.start_rate or 1.0, config.most_rate))]
        return Result(config, config.slo_seconds(None), found, server.delay_from)
    profile = read_profile(config.profile)
    slo = config.slo_seconds(profile)
    unit = unit_trace(config, profile.max_model_len)
    profile = replace(profile, max_model_len=max(arrival.prompt_len + arrival.output_len for arrival in unit))
    search_one = partial(find, config=config, profile=profile, slo=slo, unit=unit)
    if config.jobs == 1:
        found = [search_one(system, progress=progress) for system in config.systems]
    else:
        with ProcessPoolExecutor(config.jobs) as pool:
            found = list(pool.map(search_one, config.systems))
    return Result(config, slo, found, "first step")


# ---------------------------------------------------------------- simulated


def unit_trace(config: CapacityConfig, context: int) -> list[Arrival]:
    """The trial's requests at one a second on average. Raises ValueError for a request longer than the context."""
    if config.trace in LAWS:
        times = arrival_times(config.num_requests, 1.0, seed=config.seed)
        # Another stream than that of the arrivals: lengths and gaps are independent.
        return synthetic(times, draw_lengths(LAWS[config.trace], config.num_requests, ~config.seed, context))
    arrivals = read_trace(Path(config.trace))[: config.num_requests]
    for arrival in arrivals:
        if arrival.prompt_len + arrival.output_len > context:
            raise ValueError(
                f"--trace {config.trace}: the request at {arrival.time:g} s has {arrival.prompt_len} + "
                f"{arrival.output_len} tokens, the context {context}; leave it out or take another profile"
            )
    first, last = arrivals[0].time, arrivals[-1].time
    if not last > first:
        raise ValueError(f"--trace {config.trace}: at least two requests at different times are needed")
    mean = (last - first) / (len(arrivals) - 1)
    return [arrival._replace(time=(arrival.time - first) / mean) for arrival in arrivals]


def make_scheduler(system: str, profile: Profile, slo: float, overtaking: float | None = None) -> Scheduler:
    """One of SYSTEMS on a profile's memory. Prefix caching is off: requests of these traces share nothing."""
    tokens = {"prefill_first": profile.max_model_len, "decode_first": profile.max_model_len + profile.max_num_seqs}
    budget = int(system.removeprefix("static_")) if system.startswith("static_") else tokens.get(system, 0)
    config = SchedulerConfig(
        num_blocks=profile.num_blocks,
        block_size=profile.block_size,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=max(budget or profile.max_model_len, profile.max_num_seqs),
        max_num_prefill_tokens=budget or profile.max_model_len,
        max_model_len=profile.max_model_len,
        prefix_caching=False,
        slo_itl=slo if system == "quire" else None,
    )
    if overtaking is not None:
        config = replace(config, overtaking=overtaking)
    kinds = {"prefill_first": PrefillFirst, "decode_first": DecodeFirst, "quire": Scheduler}
    return kinds.get(system, StaticBudget)(config, profile.cost)


def find(
    system: str,
    config: CapacityConfig,
    profile: Profile,
    slo: float,
    unit: Sequence[Arrival],
    progress: Progress = lambda system, trial: None,
) -> Found:
    """The capacity of one system."""

    def trial(rate: float) -> Trial:
        scheduler = make_scheduler(system, profile, slo, config.overtaking)
        simulation = Simulation(scheduler, at_rate(unit, rate), profile.cost, noise=config.noise, seed=config.seed)
        tried = play(simulation, rate, slo)
        progress(system, tried)
        return tried

    work = sum(_alone(profile, arrival) for arrival in unit) / len(unit)
    return Found(system, search(trial, config.start_rate or FIRST_LOAD / work, config.most_rate))


def play(simulation: Simulation, rate: float, slo: float) -> Trial:
    """Judge one load, which comes at `rate`; a trial that cannot pass any more is given up."""
    outcomes, cost = simulation.outcomes, simulation.cost
    count = len(outcomes)
    most_gaps = sum(outcome.arrival.output_len - 1 for outcome in outcomes) * (1 - TBT_PERCENTILE / 100) + 1
    tokens = launched = steps = 0
    for step in simulation.steps():
        steps += 1
        tokens += step.shape.num_tokens
        launched += cost.launched(step.shape.num_tokens)
        if steps % LOOK == 0:
            late = sum(waited > MAX_DELAY for waited in simulation.delays())
            long = sum(gap > slo for outcome in outcomes for gap in outcome.gaps)
            if late > count / 2 + 1 or long > most_gaps:
                return Trial(rate, False, count)
    wrong = next((o for o in outcomes if o.finish != "length"), None)
    if wrong is not None:
        raise ValueError(
            f"a request of {wrong.arrival.prompt_len} tokens ended as {wrong.finish!r}, not with its length"
        )
    gaps = sorted(chain.from_iterable(outcome.gaps for outcome in outcomes))
    delays = [outcome.delay for outcome in outcomes]
    ttfts = [outcome.ttft for outcome in outcomes]
    tbt, delay = percentile(gaps, TBT_PERCENTILE), percentile(delays, 50)
    return Trial(
        rate,
        (not gaps or tbt <= slo) and delay <= MAX_DELAY,
        count,
        tbt_p50=percentile(gaps, 50),
        tbt_p99=tbt,
        delay_p50=delay,
        delay_p99=percentile(delays, 99),
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        step_tokens=tokens / steps,
        useful=tokens / launched,
        preemptions=simulation.scheduler.counters.preemptions,
    )


def _alone(profile: Profile, arrival: Arrival) -> float:
    """Seconds that a request takes of the machine: its prompt in a step of its own, its tokens in steps of others."""
    cost, prompt, output = profile.cost, arrival.prompt_len, arrival.output_len
    decode = cost.per_tile / cost.tile + cost.per_context * (prompt + output / 2)
    return cost.base + cost.work_seconds(0, prompt) + output * decode


# ---------------------------------------------------------------- reports


def table(result: Result) -> Group:
    config = result.config
    where = f"simulated {config.profile}" if config.simulate else config.url
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Load", f"{config.trace}, up to {config.num_requests} requests a trial, seed {config.seed}; {where}")
    facts.add_row("Objective", f"P99 TBT ≤ {1e3 * result.slo:.0f} ms ({config.slo}), median delay ≤ {MAX_DELAY:g} s")
    facts.add_row("Delay", f"from arrival to {result.delay_from}; median and P99, as all below, at capacity")
    columns = ("req/s", "quire is", "TBT P99", "delay", "P99", "tok/step", "useful", "preempted")
    rows = Table("", *columns, box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in rows.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "" else "right"
    ours = result.capacities.get("quire", math.nan)
    for found in result.found:
        best = found.best
        if best is None:
            rows.add_row(found.system, "0", *["-"] * 7)
            continue
        rows.add_row(
            found.system,
            f"{found.capacity:.2f}" if found.bounded else f"≥ {found.capacity:.2f}",
            _shown(ours / found.capacity, "{:.2f}×"),
            _shown(1e3 * best.tbt_p99, "{:.0f} ms"),
            _shown(best.delay_p50, "{:.2f} s"),
            _shown(best.delay_p99, "{:.1f} s"),
            _shown(best.step_tokens, "{:.0f}"),
            _shown(100 * best.useful, "{:.0f} %"),
            str(best.preemptions),
        )
    if not all(found.bounded for found in result.found):
        facts.add_row("≥", "no higher rate failed: raise --num-requests, whose trials are too short to overload it")
    return Group(facts, rows)


def as_json(result: Result) -> dict[str, Any]:
    settings = asdict(result.config)
    del settings["api_key"]
    return {
        "benchmark": "capacity",
        "settings": settings,
        "slo_ms": 1e3 * result.slo,
        "max_delay_s": MAX_DELAY,
        "delay_from": result.delay_from,
        "capacity_qps": result.capacities,
        "bounded": {found.system: found.bounded for found in result.found},
        "at_capacity": {found.system: _plain(found.best) for found in result.found if found.best},
        "trials": {found.system: [_plain(trial) for trial in found.trials] for found in result.found},
    }


def _shown(value: float, text: str) -> str:
    return "-" if math.isnan(value) else text.format(value)


def _plain(trial: Trial) -> dict[str, Any]:
    # JSON has no NaN: what is not known is null.
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(trial).items()}
