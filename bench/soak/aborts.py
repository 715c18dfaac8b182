"""Clients that leave at any moment: nothing of them stays, and nobody else notices.

Then the same eye looks at leaks that were planted, one of each kind: a detector that finds nothing there says nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import aiohttp

from .clients import VICTIM, Pace, Victim, in_background, leave, session, stay
from .mix import Ask, any_request
from .served import Served, wait_for
from .verdict import Row, all_of, none

CHECK = "aborts"
AT_ONCE = 32
SPECULATION = ("none", "ngram", "draft")
# Fewer places than clients, so that some leave while they wait; a cache that long prompts must share.
OPTIONS = (
    *(
        "--dtype",
        "float32",
        "--max-num-seqs",
        "12",
        "--kv-cache-bytes",
        "32MiB",
        "--text-threads",
        "2",
        "--log-level",
        "warning",
    ),
    *("--speculative-method", "draft", "--speculative-model", "bundled", "--num-speculative-tokens", "3"),
)
PLANTS = {
    "plant-task": "tasks",
    "plant-fd": "server descriptors",
    "plant-thread": "server threads",
    "plant-child": "children",
    "plant-object": "object ",
}


def check(folder: Path, *, model: str, count: int, seed: int) -> list[Row]:
    with Served(folder / CHECK, model, *OPTIONS, window=True) as served:
        return asyncio.run(_check(served, count, seed))


async def _check(served: Served, count: int, seed: int) -> list[Row]:
    rng, victim, pace = random.Random(seed), Victim(), Pace()
    async with session() as ends, session(resets=True) as resets:
        await victim.alone(ends, served.url)
        await _leave(served, ends, resets, rng, pace, 4 * AT_ONCE)  # pools and caches get their full size
        before = await asyncio.to_thread(served.at_rest)
        seen = await asyncio.to_thread(served.metrics)
        with in_background(victim.go_on(ends, served.url)):
            moments = await _leave(served, ends, resets, rng, pace, count)
        left = await asyncio.to_thread(served.leaks, before)
        now = await asyncio.to_thread(served.metrics)
        rows = [Row(CHECK, "requests left by their clients", _told(moments, seen, now), f"{count}", None)]
        left_by_kind = {name: left.get(name, 0) for name in COUNTED}
        left_by_kind["objects"] = sum(more for name, more in left.items() if name.startswith("object "))
        rows += [none(CHECK, f"{name} left behind", more) for name, more in left_by_kind.items()]
        rows.append(none(CHECK, "engine restarts", now["quire_engine_restarts_total"]))
        rows.append(all_of(CHECK, "neighbour's answers unchanged", victim.asked - victim.changed, victim.asked))
        rows.append(await _find_planted(served, ends))
    return rows


COUNTED = (
    "KV blocks (%)", "running samples", "waiting samples", "tasks", "server descriptors", "engine descriptors",
    "server threads", "engine threads", "children",
)  # fmt: skip


def _told(moments: Counter[str], before: dict[str, float], after: dict[str, float]) -> str:
    stages = {
        stage: after.get(f'quire_requests_aborted_total{{stage="{stage}"}}', 0)
        - before.get(f'quire_requests_aborted_total{{stage="{stage}"}}', 0)
        for stage in ("waiting", "running")
    }
    left = ", ".join(f"{number} {moment}" for moment, number in sorted(moments.items()))
    return (
        f"{sum(moments.values())}: {left}; the server saw {stages['waiting']:g} waiting, {stages['running']:g} running"
    )


async def _leave(
    served: Served,
    ends: aiohttp.ClientSession,
    resets: aiohttp.ClientSession,
    rng: random.Random,
    pace: Pace,
    count: int,
) -> Counter[str]:
    """`count` requests that were left before their end, AT_ONCE at a time, by moment."""
    moments: Counter[str] = Counter()

    async def one_after_another() -> None:
        while sum(moments.values()) < count:
            ask = any_request(rng, speculation=SPECULATION)
            moment = await leave(rng.choice((ends, resets)), served.url, ask, rng, pace)
            if moment != "ended" and sum(moments.values()) < count:
                moments[moment] += 1

    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
    return moments


async def _find_planted(served: Served, http: aiohttp.ClientSession) -> Row:
    """One leak of each kind, and blocks held by a request that nobody ends; each must be found."""
    found = []
    for plant, name in PLANTS.items():
        before = await asyncio.to_thread(served.at_rest)
        await stay(http, served.url, VICTIM, {"X-Request-Id": plant})
        left = await asyncio.to_thread(served.leaks, before, 3)
        if any(leak.startswith(name) for leak in left):
            found.append(plant)
    before = await asyncio.to_thread(served.at_rest)
    endless = Ask(VICTIM.path, VICTIM.body | {"max_tokens": 1900, "n": 12, "temperature": 1.0})
    with in_background(stay(http, served.url, endless)):
        await asyncio.to_thread(wait_for, lambda: served.metrics()["quire_num_requests_running"] > 0, 30, "a step")
        left = await asyncio.to_thread(served.leaks, before, 1)
        if "KV blocks (%)" in left and "running samples" in left:
            found.append("blocks")
    return all_of(CHECK, "planted leaks found", len(found), len(PLANTS) + 1)
