"""Kill the server in the middle of its work and start it again on the same port, many times: nothing is in its way."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .clients import Answer, in_background, session, stay, until
from .faults import ENDLESS, OPTIONS, SHORT
from .served import SETTLE_SECONDS, Served, alive, free_port, wait_for
from .verdict import Row, all_of, none

CHECK = "cycles"
FIRST_SECONDS = 1.0  # from ready to the first answer
GONE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Cycle:
    """Seconds: from the start to ready, from there to the first answer, from the kill to the end of all processes."""

    start: float
    first: float
    gone: float
    answered: int
    left_behind: int


def check(folder: Path, *, model: str, cycles: int, requests: int) -> list[Row]:
    """`requests` are to be answered in each cycle before the kill."""
    port, done = free_port(), []
    for i in range(cycles):
        with Served(folder / f"{CHECK}-{i}", model, *OPTIONS, port=port) as served:
            done.append(asyncio.run(_cycle(served, requests)))
    starts, firsts, gone = ([getattr(cycle, name) for cycle in done] for name in ("start", "first", "gone"))
    return [
        all_of(CHECK, "starts on one port that served all", sum(c.answered == requests for c in done), cycles),
        all_of(
            CHECK, f"first answer ≤ {FIRST_SECONDS:g} s after load", sum(s <= FIRST_SECONDS for s in firsts), cycles
        ),
        all_of(
            CHECK, f"no process left {GONE_SECONDS:g} s after the kill", sum(s <= GONE_SECONDS for s in gone), cycles
        ),
        none(CHECK, "files, sockets and shared memory left behind", sum(cycle.left_behind for cycle in done)),
        *(
            Row(CHECK, what, f"median {median(seconds):.2f} s, first {seconds[0]:.2f} s, worst {max(seconds):.2f} s")
            for what, seconds in (("load", starts), ("first answer after it", firsts), ("end of all processes", gone))
        ),
    ]


async def _cycle(served: Served, requests: int) -> Cycle:
    answered = 0
    async with session() as http:
        begin = time.monotonic()
        answered += (await stay(http, served.url, SHORT)).whole
        first = time.monotonic() - begin
        for _ in range(requests - 1):
            answered += (await stay(http, served.url, SHORT)).whole
        streams = [Answer() for _ in range(4)]
        with in_background(*(stay(http, served.url, ENDLESS, into=answer) for answer in streams)):
            await until(lambda: all(answer.began for answer in streams), "the first tokens")
            family, traces = served.family(), served.traces()
            served.process.kill()
            served.process.wait()
            gone = wait_for(lambda: not any(map(alive, family)), SETTLE_SECONDS, "the end of its children")
    left = sum(path.exists() for path in traces | set(served.temporary.rglob("*")))
    return Cycle(served.start_seconds, first, gone, answered, left)
