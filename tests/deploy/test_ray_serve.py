"""The fleet on Ray Serve, two replicas on loopback: `make ray-test`. Without Ray these tests are skipped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import httpx
import pytest

pytest.importorskip("ray.serve")

from quire.deploy.ray import measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # Ray's own
]

# At their end about twice what one replica's cache holds. So many that chance does not decide: with 32 sessions and 300
# blocks the ratio of two runs was 1.4 and 1.8.
TALKS = measure.Talks(sessions=48, turns=7)
BLOCKS = 440


@pytest.fixture(scope="module")
def fleet() -> Iterator[str]:
    """The address of a fleet; `measure.run` puts an application there."""
    with measure.cluster() as url:
        yield url


def test_answers_are_those_of_the_application(fleet: str) -> None:
    measure.run(**{"served-model-name": ["small", "little"]})
    with httpx.Client(base_url=fleet, timeout=measure.WAIT_SECONDS) as http:
        assert http.get("/ready").json() == {"status": "ok"}
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["small", "little"]
        body = {"model": "little", "prompt": "def f(x):", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        whole = http.post("/v1/completions", json=body)
        assert whole.status_code == 200, whole.text
        assert whole.headers["x-request-id"]
        texts, frames = [], 0
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert lines.pop() == "data: [DONE]"
        for line in lines:
            frames += 1
            texts += [choice["text"] for choice in json.loads(line.removeprefix("data: "))["choices"]]
        assert frames > 1
        assert "".join(texts) == whole.json()["choices"][0]["text"]
        refused = http.post("/v1/completions", json={**body, "max_tokens": -1})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "max_tokens"
        assert http.get("/nowhere").status_code == 404
        page = http.get("/metrics").text
        replicas = {
            line.partition('replica="')[2].partition('"')[0] for line in page.splitlines() if "replica=" in line
        }
        assert len(replicas) == 2


def test_who_hangs_up_ends_the_work(fleet: str) -> None:
    measure.run()

    async def scenario() -> None:
        async with measure.session_to() as http:
            body = {"prompt": "def f(x):", "max_tokens": 1900, "ignore_eos": True, "stream": True}
            response = await http.post(f"{fleet}/v1/completions", json=body)
            await response.content.readline()
            response.close()
            for _ in range(600):
                async with http.get(f"{fleet}/metrics") as answer:
                    page = await answer.text()
                lines = [line for line in page.splitlines() if line.startswith("quire_num_requests_running{")]
                if (
                    lines
                    and all(line.endswith(" 0.0") for line in lines)
                    and _total(page, "quire_requests_aborted_total{") > 0
                ):
                    return
                await asyncio.sleep(0.1)
            raise AssertionError("the engine goes on for nobody")

    asyncio.run(scenario())


def _total(page: str, beginning: str) -> float:
    """Sum of a family's samples."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(beginning))


def test_prefix_aware_routing_finds_more_than_chance(fleet: str) -> None:
    loads: dict[str, Any] = {}
    for routing in ("random", "prefix"):
        measure.run(routing=routing, **{"num-blocks": BLOCKS})
        loads[routing] = asyncio.run(measure.talk(fleet, TALKS))
        assert loads[routing].finished == TALKS.sessions * TALKS.turns
        print(routing, loads[routing].summary())
    assert loads["prefix"].hit_tokens >= 1.3 * loads["random"].hit_tokens


def test_a_killed_replica_is_replaced_and_hardly_missed(fleet: str) -> None:
    measure.run()
    killed = asyncio.run(measure.kill_under_load(fleet))
    print(killed.summary())
    assert killed.load.finished >= 0.99 * len(killed.load.answers)
    assert not {answer.error for answer in killed.load.answers} - {"", "engine_dead"}, "a stream never ends in silence"


def test_a_drain_lets_running_requests_finish(fleet: str) -> None:
    """The application is taken away while a stream runs: it ends as it would have."""
    from ray import serve

    async def scenario() -> measure.Answer:
        body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 1500, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with measure.session_to() as http:
            asking = asyncio.create_task(measure.ask(http, fleet, body))
            await _until_running(http, fleet)
            gone = asyncio.create_task(asyncio.to_thread(serve.delete, measure.APP))
            answer = await asking
            await gone
            return answer

    answer = asyncio.run(scenario())
    assert answer.error == ""
    assert answer.tokens == 1500


async def _until_running(http: aiohttp.ClientSession, url: str) -> None:
    for _ in range(600):
        async with http.get(f"{url}/metrics") as response:
            if _total(await response.text(), "quire_num_requests_running{") > 0:
                return
        await asyncio.sleep(0.05)
    raise AssertionError("the request never ran")


def test_more_replicas_come_while_queues_are_long(fleet: str) -> None:
    """One place for each replica, and eight who ask all the time."""
    measure.run(replicas=1, max_replicas=2, **{"max-num-seqs": 1})

    async def scenario() -> int:
        async with measure.session_to() as http:
            crowd = [asyncio.create_task(_ask_on(http, fleet)) for _ in range(8)]
            try:
                for _ in range(300):
                    there = len(await measure.replicas(http, fleet))
                    if there > 1:
                        return there
                    await asyncio.sleep(1)
                return 1
            finally:
                for one in crowd:
                    one.cancel()
                await asyncio.gather(*crowd, return_exceptions=True)

    assert asyncio.run(scenario()) == 2


async def _ask_on(http: aiohttp.ClientSession, url: str) -> None:
    while True:
        await measure.ask(http, url, {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 64})
