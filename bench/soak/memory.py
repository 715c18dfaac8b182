"""Does it grow? Both processes under a mixed load; then the same with a leak planted, which must be seen."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import aiohttp

from .clients import Pace, Victim, in_background, leave, session, stay
from .mix import any_request
from .served import Served, SoakError
from .slope import Slope, theil_sen
from .verdict import Row, all_of, none

CHECK = "memory"
AT_ONCE = 8
SAMPLE_SECONDS = 5.0
WARM_SHARE = 1 / 3  # of the run: pools, caches and the allocator's arenas get their size
CONTROL_SHARE = 1 / 3  # as long as that is the run with the planted leak
BOUND = 1.0  # MB an hour
STEP = 0.25  # MB: what allocators take or give back at once; a short run cannot tell it from growth
# A cache that the load fills within the warm-up: pages of it count when they are first written. No look-ups: what they
# remember, half a kilobyte a token, grows by 2 KB a request up to 32 MB, which takes more requests than a run has.
OPTIONS = (
    *("--dtype", "float32", "--max-num-seqs", "16", "--kv-cache-bytes", "24MiB", "--log-level", "error"),
    *("--speculative-method", "draft", "--speculative-model", "bundled"),
)
JSON = {"Content-Type": "application/json"}
BAD = (b"{", b'{"prompt": 1.5}', b'{"prompt": "x", "n": 100000}', b'{"prompt": "x", "temperature": -1}', b"\xff" * 2000)


def check(folder: Path, *, model: str, minutes: float, seed: int) -> list[Row]:
    with Served(folder / CHECK, model, *OPTIONS, window=True) as served:
        return asyncio.run(_check(served, 60 * minutes, seed))


async def _check(served: Served, seconds: float, seed: int) -> list[Row]:
    rng, victim = random.Random(seed), Victim()
    async with session() as ends, session(resets=True) as resets:
        await victim.alone(ends, served.url)
        sessions = (ends, resets)
        with in_background(victim.go_on(ends, served.url), *_load(served.url, sessions, rng, {})) as work:
            slopes = await _grow(served, work, seconds, WARM_SHARE)
            served_requests = (await asyncio.to_thread(served.metrics))["quire_http_requests_total"]
        with in_background(*_load(served.url, sessions, rng, {"X-Request-Id": "plant-memory"})) as work:
            leaking = (await _grow(served, work, CONTROL_SHARE * seconds, 0))["server"]
    bound = max(BOUND, STEP / ((1 - WARM_SHARE) * seconds / 3600))
    restarts = (await asyncio.to_thread(served.metrics))["quire_engine_restarts_total"]
    return [
        Row(CHECK, f"requests in {seconds / 60:g} minutes", f"{served_requests:g}"),
        *(
            Row(CHECK, f"growth of the {name}", _told(slope), f"< {bound:.3g} MB/h", slope.value < bound)
            for name, slope in slopes.items()
        ),
        Row(CHECK, "growth with a planted leak", _told(leaking), f"seen: > {bound:.3g} MB/h", leaking.value > bound),
        all_of(CHECK, "neighbour's answers unchanged", victim.asked - victim.changed, victim.asked),
        none(CHECK, "engine restarts", restarts),
    ]


def _told(slope: Slope) -> str:
    return f"{slope.value:+.2f} MB/h ({slope.low:+.2f} to {slope.high:+.2f})"


def _load(
    url: str, sessions: tuple[aiohttp.ClientSession, ...], rng: random.Random, headers: dict[str, str]
) -> list[object]:
    """Clients that ask one thing after another: to the end, half way, or what nobody can answer."""
    pace = Pace()

    async def client() -> None:
        while True:
            http, ask, kind = rng.choice(sessions), any_request(rng, speculation=("none", "draft")), rng.random()
            if kind < 0.6:
                answer = await stay(http, url, ask, headers)
                if not answer.whole:
                    raise SoakError(f"{ask} got {answer}")
            elif kind < 0.85:
                await leave(http, url, ask, rng, pace)
            else:
                bad = rng.choice(BAD)
                async with http.post(url + ask.path, data=bad, headers={**JSON, **headers}) as response:
                    if response.status != 400:
                        raise SoakError(f"HTTP {response.status} instead of 400: {await response.text()}")

    return [client() for _ in range(AT_ONCE)]


async def _grow(
    served: Served, work: list[asyncio.Task[object]], seconds: float, warm_share: float
) -> dict[str, Slope]:
    """MB an hour of each process, over what comes after the warm-up, while all `work` goes on."""
    begin = time.monotonic()
    samples: list[tuple[float, dict[str, float]]] = []
    while (passed := time.monotonic() - begin) < seconds:
        if passed >= warm_share * seconds:
            for task in work:
                if task.done():
                    task.result()  # raises what it could not go on with
            samples.append((passed / 3600, await asyncio.to_thread(served.rss)))
        await asyncio.sleep(SAMPLE_SECONDS)
    return {name: theil_sen([(hours, rss[name]) for hours, rss in samples]) for name in ("server", "engine")}
