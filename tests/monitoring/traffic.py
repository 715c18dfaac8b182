"""Traffic that makes every instrument move: tenants, promises, guesses, quotas, clients that leave or come too late."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import yaml

from quire.bench.client import COMPLETIONS
from quire.bench.dataset import POOL_TEXT
from quire.bench.serve import LoadConfig, Result, run

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
WORDS = POOL_TEXT.split()
PREFIX = " ".join(WORDS[:120])  # what all prompts begin with: the prefix cache holds it

SCRAPES = 3.0  # seconds: of the first of its kind no rate tells, nor of what nobody has looked between

# Four at a time and eight that wait, in a cache that holds two long requests: it queues, preempts and refuses.
OPTIONS = (
    *("--max-num-seqs", "4", "--max-queued-requests", "8", "--max-model-len", "1024", "--kv-cache-bytes", "6MiB"),
    *("--speculative-method", "draft", "--speculative-model", "bundled", "--speculative-adaptive", "off"),
)


def keys_file() -> str:
    """bob may send a request a second, and sends more."""
    entries: list[dict[str, Any]] = [
        {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()} for name, key in KEYS.items()
    ]
    entries[1]["rpm"] = 60
    return yaml.safe_dump(entries)


async def drive(url: str, seconds: float) -> Result:
    """All of it beside `quire bench serve`, of which the result is given."""
    rate = 2.0
    bench = LoadConfig(
        base_url=url,
        api_key=KEYS["alice"],
        num_warmups=0,
        num_prompts=int(rate * seconds),
        request_rate=rate,
        random_input_len=200,
        random_output_len=96,
        random_range_ratio=0.5,
        temperature=1.0,
        extra_body={"slo": {"ttft_ms": 1000, "itl_ms": 100}},
    )
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as http:
        ask = Asker(http, url)
        for _ in range(3):  # while there is room for sure
            await asyncio.sleep(SCRAPES)
            await ask.stays()
            await ask.late()
            await ask.leaves()
        end = time.monotonic() + seconds
        others = (
            ask.again(end, pause, how)
            for how, pause in ((ask.stays, 0.5), (ask.leaves, 3), (ask.late, 3), (ask.wrong, 2))
        )
        result, *_ = await asyncio.gather(run(bench), *others, ask.again(end, 15, ask.flood))
    return result


class Asker:
    """One way of asking a method; refusals are answers, and part of it."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http, self._url = http, url
        self._rng = random.Random(7)

    async def again(self, end: float, pause: float, how: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < end:
            await how()
            await asyncio.sleep(pause * self._rng.uniform(0.5, 1.5))

    async def stays(self) -> None:
        await self._post("bob", max_tokens=64, slo={"deadline_ms": 600_000})

    async def leaves(self) -> None:
        body = {**self._body(), "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with self._http.post(self._url + COMPLETIONS, json=body, headers=_of("alice")) as response:
            await response.content.readany()

    async def late(self) -> None:
        await self._post("alice", max_tokens=400, ignore_eos=True, timeout=0.2)

    async def wrong(self) -> None:
        await self._post("alice", n=0)
        await self._post("alice", model="nobody")

    async def flood(self) -> None:
        """More than fit into the house, all of them long enough that the cache runs out."""
        await asyncio.gather(*(self._post("alice", max_tokens=500, ignore_eos=True) for _ in range(20)))

    async def _post(self, tenant: str, **fields: Any) -> None:
        async with self._http.post(
            self._url + COMPLETIONS, json={**self._body(), **fields}, headers=_of(tenant)
        ) as response:
            await response.read()

    def _body(self) -> dict[str, Any]:
        return {"prompt": f"{PREFIX} {' '.join(self._rng.choices(WORDS, k=30))}", "temperature": 0.8}


def _of(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[tenant]}"}
