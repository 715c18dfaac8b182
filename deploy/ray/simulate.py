"""What routing is worth, played without Ray, models or machines: a fleet of schedulers under conversations.

    python -m quire.deploy.ray.simulate            every way to route, at the same traffic
    python -m quire.deploy.ray.simulate --sweep    prefix-aware, with several weights of an open request

Each replica is the real scheduler with a prefix cache on a machine's step times (`scheduler/simulate.py`). Turns of a
session begin with all that was said before; beside them, requests that ask once and never again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ...bench.hardware import Profile, read_profile
from ...bench.metrics import percentile
from ...scheduler.config import SchedulerConfig
from ...scheduler.scheduler import Scheduler
from ...scheduler.simulate import Outcome, Simulation
from ...scheduler.traces import Arrival, LengthLaw, arrival_times, conversations, draw_lengths, merged, synthetic
from .prefix import CHUNK_BYTES, Chain, chain
from .routing import OPEN_CHUNKS, Fleet

BYTES_PER_TOKEN = 4
CONTEXT = 8192

# What a turn of a talk adds, and a single request with a document: (median, 90th percentile) of tokens, as the
# applications of `bench/sessions.py` have them.
TALK = LengthLaw((80, 300), (160, 400), CONTEXT)
SINGLE = LengthLaw((1200, 3000), (60, 120), CONTEXT)

Route = Callable[[Chain, Sequence[int]], int]  # (what its prompt begins with, requests open at each) -> a replica


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """rate: sessions and single requests a second at the whole fleet; think: seconds between turns, on average."""

    replicas: int = 4
    rate: float = 3.0
    requests: int = 3000
    turns: float = 5.0
    think: float = 30.0
    singles: float = 1 / 3
    blocks: int | None = None  # of a replica's cache; None = the profile's
    seed: int = 0


def trace(traffic: Traffic) -> list[Arrival]:
    """Sessions and single requests; the first `requests` of them."""
    starts = arrival_times(traffic.requests, traffic.rate * (1 - traffic.singles), seed=traffic.seed)
    sessions = conversations(starts, TALK, turns=traffic.turns, think=traffic.think, seed=traffic.seed)
    alone = arrival_times(traffic.requests, traffic.rate * traffic.singles, seed=traffic.seed + 1)
    singles = synthetic(alone, draw_lengths(SINGLE, traffic.requests, traffic.seed))
    return merged(sessions, singles)[: traffic.requests]


def chain_of(arrival: Arrival, serial: int) -> Chain:
    """As a router sees the prompt: text that is a session's own."""
    whose = b"session %d" % arrival.session if arrival.session >= 0 else b"request %d" % serial
    return chain(bytes(arrival.prompt_len * BYTES_PER_TOKEN), whose)


def play(traffic: Traffic, profile: Profile, route: Route) -> list[Outcome]:
    """What becomes of each request when `route` chooses its replica."""
    fleet = [Simulation(_scheduler(profile, traffic.blocks), (), profile.cost) for _ in range(traffic.replicas)]
    outcomes = []
    for serial, arrival in enumerate(trace(traffic)):
        for replica in fleet:
            _advance(replica, arrival.time)
        chosen = route(chain_of(arrival, serial), [replica.num_open for replica in fleet])
        outcomes.append(fleet[chosen].submit(arrival))
    for replica in fleet:
        _advance(replica, float("inf"))
    return outcomes


def _advance(replica: Simulation, until: float) -> None:
    steps = replica.steps()
    while replica.num_open and replica.now < until:
        next(steps, None)


def _scheduler(profile: Profile, blocks: int | None) -> Scheduler:
    config = SchedulerConfig(
        num_blocks=blocks or profile.num_blocks,
        block_size=profile.block_size,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=max(2048, profile.max_num_seqs),
        max_model_len=min(profile.max_model_len, CONTEXT),
    )
    return Scheduler(config, profile.cost)


# ---------------------------------------------------------------- ways to route


def at_random(seed: int = 0) -> Route:
    draw = random.Random(seed)
    return lambda _, open: draw.randrange(len(open))


def two_choices(seed: int = 0) -> Route:
    """The less busy one of two drawn by lot."""
    draw = random.Random(seed)
    return lambda _, open: min(draw.sample(range(len(open)), 2), key=open.__getitem__)


def prefix_aware(traffic: Traffic, profile: Profile, open_chunks: float = OPEN_CHUNKS) -> Route:
    fleet = Fleet(open_chunks, seed=traffic.seed)
    names = [str(i) for i in range(traffic.replicas)]
    fleet.keep(names)
    capacity = (traffic.blocks or profile.num_blocks) * profile.block_size * BYTES_PER_TOKEN // CHUNK_BYTES
    for name in names:
        fleet.told(name, capacity=capacity, engine=0)

    def route(chain: Chain, open: Sequence[int]) -> int:
        best = fleet.rank(chain, dict(zip(names, open, strict=True)))[0]
        fleet.sent(best, chain)
        return int(best)

    return route


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figures:
    hit_tokens: int
    prompt_tokens: int
    ttft_p50: float
    ttft_p99: float
    itl_p99: float
    seconds: float


def figures(outcomes: Sequence[Outcome]) -> Figures:
    ttfts = [outcome.ttft for outcome in outcomes]
    gaps = [gap for outcome in outcomes for gap in outcome.gaps]
    return Figures(
        sum(outcome.num_cached for outcome in outcomes),
        sum(outcome.arrival.prompt_len for outcome in outcomes),
        percentile(ttfts, 50),
        percentile(ttfts, 99),
        percentile(gaps, 99),
        max(outcome.end for outcome in outcomes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m quire.deploy.ray.simulate")
    parser.add_argument("--profile", default="h100-8b")
    parser.add_argument("--sweep", action="store_true")
    for name, kind in (("replicas", int), ("rate", float), ("requests", int), ("blocks", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Traffic, name))
    args = parser.parse_args()
    profile = read_profile(args.profile)
    given = vars(args)
    traffic = Traffic(**{name: given[name] for name in ("replicas", "rate", "requests", "blocks", "seed")})
    if args.sweep:
        ways = {f"open request = {w:g} chunks": prefix_aware(traffic, profile, w) for w in (0, 1, 2, 4, 8, 16, 32)}
    else:
        ways = {
            "random": at_random(args.seed),
            "two choices": two_choices(args.seed),
            "prefix-aware": prefix_aware(traffic, profile),
        }
    table = Table(title=f"{traffic.replicas} replicas of {profile.name}, {traffic.requests} requests")
    for column in ("routing", "hit tokens", "of the prompts", "TTFT p50 [ms]", "TTFT p99 [ms]", "ITL p99 [ms]"):
        table.add_column(column, justify="left" if column == "routing" else "right")
    for name, route in ways.items():
        f = figures(play(traffic, profile, route))
        share = f"{100 * f.hit_tokens / f.prompt_tokens:.1f} %"
        times = (f"{1000 * seconds:.0f}" for seconds in (f.ttft_p50, f.ttft_p99, f.itl_p99))
        table.add_row(name, f"{f.hit_tokens:,}", share, *times)
    Console().print(table)


if __name__ == "__main__":
    main()
