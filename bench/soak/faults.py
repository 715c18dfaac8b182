"""An engine that is killed or stops under load: how soon everybody knows, and how soon there is another."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp

from .clients import Answer, Standstill, in_background, session, stay, until
from .mix import Ask
from .served import LOOK_SECONDS, Served, SoakError
from .verdict import Row, all_of, at_most

CHECK = "faults"
STREAMS = 16
TOKENS = 1500  # of each stream, far more than it gets to say
AFTERWARDS = 200  # requests to the next engine
TOLD_SECONDS, AGAIN_SECONDS, NOTICED_SECONDS = 2.0, 2.0, 10.0
SHARE_AFTERWARDS = 0.99
OPTIONS = ("--dtype", "float32", "--max-num-seqs", "32", "--kv-cache-bytes", "64MiB", "--log-level", "warning")

ENDLESS = Ask(
    "/v1/completions", {"prompt": "x", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0, "stream": True}
)
SHORT = Ask("/v1/completions", {"prompt": "def f():", "max_tokens": 4, "ignore_eos": True, "temperature": 0})


def check(folder: Path, *, model: str, rounds: int) -> list[Row]:
    """Every round has a server of its own: one that has lost an engine a moment ago waits before it starts the next."""
    rows = []
    for i in range(rounds):
        for name, number in (("SIGKILL", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)):
            with Served(folder / f"{CHECK}-{name}-{i}", model, *OPTIONS) as served:
                rows += asyncio.run(_fault(served, name, number))
    return rows


async def _fault(served: Served, name: str, number: int) -> list[Row]:
    load = served.load_seconds()
    still = Standstill()
    answers = [Answer() for _ in range(STREAMS)]
    async with session() as http:
        with in_background(
            *(stay(http, served.url, ENDLESS, into=answer) for answer in answers), still.watch()
        ) as work:
            await until(lambda: all(answer.began for answer in answers), "the first tokens")
            os.kill(served.engine_pid(), number)
            begin = time.monotonic()
            noticed = asyncio.ensure_future(_when(served, 503))
            await asyncio.gather(*work[:STREAMS])
            noticed_after = await noticed - begin
            again_after = await _when(served, 200) - begin
            good = await _ask_again(http, served.url)
    told = [answer for answer in answers if answer.done and answer.code == "engine_dead"]
    last_told = max(answer.ended for answer in answers) - begin
    rows = [
        all_of(CHECK, f"{name}: streams that ended with an error event", len(told), STREAMS),
        Row(
            CHECK,
            f"{name}: requests served after it was ready again",
            f"{good} of {AFTERWARDS}",
            f"≥ {SHARE_AFTERWARDS:.0%}",
            good >= SHARE_AFTERWARDS * AFTERWARDS,
        ),
    ]
    if number == signal.SIGSTOP:
        rows.append(at_most(CHECK, f"{name}: noticed after", noticed_after, NOTICED_SECONDS))
        rows.append(Row(CHECK, f"{name}: last stream ended after", f"{last_told:.2f} s"))
        rows.append(Row(CHECK, f"{name}: ready again after", f"{again_after:.2f} s"))
    else:
        rows.append(at_most(CHECK, f"{name}: last stream ended after", last_told, TOLD_SECONDS))
        rows.append(
            at_most(CHECK, f"{name}: ready again after (load: {load:.2f} s)", again_after, AGAIN_SECONDS + load)
        )
    rows.append(Row(CHECK, f"{name}: this machine stood still for", f"{still.seconds:.2f} s"))
    return rows


async def _when(served: Served, status: int) -> float:
    """When the first look at /ready began that was told so. In a thread: what is measured must not wait for us."""

    def look() -> float:
        end = time.monotonic() + 120
        while (now := time.monotonic()) < end:
            if served.status("/ready") == status:
                return now
            time.sleep(LOOK_SECONDS)
        raise SoakError(f"/ready did not come to say {status}")

    return await asyncio.to_thread(look)


async def _ask_again(http: aiohttp.ClientSession, url: str) -> int:
    """How many of AFTERWARDS requests, eight at a time, are served."""
    left, answers = AFTERWARDS, []

    async def some() -> None:
        nonlocal left
        while left:
            left -= 1
            answers.append(await stay(http, url, SHORT))

    await asyncio.gather(*(some() for _ in range(8)))
    return sum(answer.whole for answer in answers)
