"""SIGTERM while fifty streams run: they finish, nobody new is let in, and the server leaves cleanly."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from .clients import Answer, in_background, session, stay, until
from .mix import Ask
from .served import LOOK_SECONDS, Served, alive, wait_for
from .verdict import Row, all_of

CHECK = "drain"
STREAMS = 50
TOKENS = 300  # of each; enough that all are still at it when the signal comes
DRAIN_SECONDS = 300
OPTIONS = (
    *("--dtype", "float32", "--max-num-seqs", "64", "--kv-cache-bytes", "64MiB"),
    *("--drain-timeout", str(DRAIN_SECONDS), "--log-level", "warning"),
)
LONG = Ask(
    "/v1/completions",
    {"prompt": "def f():", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "stream": True},
)


def check(folder: Path, *, model: str, rounds: int) -> list[Row]:
    rows = []
    for i in range(rounds):
        with Served(folder / f"{CHECK}-{i}", model, *OPTIONS) as served:
            rows += asyncio.run(_check(served))
    return rows


async def _check(served: Served) -> list[Row]:
    family = served.family()
    late: list[Answer] = []
    async with session() as http:
        expected = await stay(http, served.url, LONG)
        answers = [Answer() for _ in range(STREAMS)]
        with in_background(*(stay(http, served.url, LONG, into=answer) for answer in answers)) as work:
            await until(lambda: all(answer.began for answer in answers), "the first tokens")
            served.process.send_signal(signal.SIGTERM)
            running = sum(not answer.ended for answer in answers)
            while not all(task.done() for task in work):
                await asyncio.sleep(5 * LOOK_SECONDS)
                if served.status("/ready") == 503:  # it has heard the signal, and is still there
                    late.append(await stay(http, served.url, LONG))
    wait_for(lambda: served.process.poll() is not None, DRAIN_SECONDS, "the end of the server")
    wait_for(lambda: not any(map(alive, family)), 10, "the end of its children")
    # the connection of one that comes as the last stream ends may be refused: nobody listens any more
    refused = [answer for answer in late if answer.code == "server_draining" or answer.status == 0]
    finished = sum(answer.whole and answer.text == expected.text for answer in answers)
    return [
        Row(CHECK, "streams running when the signal came", str(running)),
        all_of(CHECK, "streams that finished, with the text of one alone", finished, STREAMS),
        all_of(CHECK, "new requests refused with 503 meanwhile", len(refused), len(late)),
        Row(CHECK, "exit code", str(served.process.returncode), "0", served.process.returncode == 0),
    ]
