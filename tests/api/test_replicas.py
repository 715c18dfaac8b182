"""Replicas behind the fleet's way in, without Ray: the real application answers, over scripted engines."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.deploy.ray.call import Call, Part
from quire.deploy.ray.ingress import Ingress
from quire.deploy.ray.prefix import CHUNK_BYTES
from quire.deploy.ray.replica import Replica
from quire.deploy.ray.routing import Fleet
from quire.engine.errors import EngineStartError
from quire.server.config import ServerConfig

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"prompt": "Say hello. " * 20, "max_tokens": 20}


class House:
    """Two replicas, chosen by `Fleet`; `client` speaks to them through an Ingress."""

    def __init__(self, replicas: dict[str, Replica], client: Callable[[Ingress], httpx.AsyncClient]) -> None:
        self.replicas = replicas
        self.fleet = Fleet(seed=0)
        self.fleet.keep(replicas)
        self.went: list[str] = []
        self.client = client(Ingress(self.ask, self.everyone, 1 << 20))

    async def ask(self, call: Call) -> AsyncIterator[Part]:
        name = (self.fleet.rank(call.chain, {}, call.avoid) or self.fleet.rank(call.chain, {}))[0]
        self.fleet.sent(name, call.chain)
        self.went.append(name)
        async for part in self.replicas[name].answer(call):
            yield part

    async def everyone(self, call: Call) -> list[tuple[str, int, bytes]]:
        return [await replica.whole(call) for replica in self.replicas.values()]


@pytest.fixture
def house(folder: Path, fake: Any) -> Callable[..., Any]:
    """`async with house(**ServerConfig fields) as (House, engines):` two replicas with an engine each."""

    @asynccontextmanager
    async def open_house(**settings: Any) -> AsyncIterator[tuple[House, list[Any]]]:
        engines = [fake, type(fake)(folder)]
        replicas = {f"r{i}": Replica(f"r{i}", engine, ServerConfig(**settings)) for i, engine in enumerate(engines)}
        for replica in replicas.values():
            await replica.start()

        def client(app: Ingress) -> httpx.AsyncClient:
            transport = httpx.ASGITransport(app=app)
            return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=10)

        there = House(replicas, client)
        try:
            async with there.client:
                yield there, engines
        finally:
            for replica in replicas.values():
                await replica.stop()

    return open_house


async def test_a_replica_answers_as_a_server_does(house: Any, http: httpx.AsyncClient, events: Any) -> None:
    def gist(payloads: list[Any]) -> str:
        return "".join(choice.get("text") or "" for payload in payloads for choice in payload["choices"])

    alone = await http.post(COMPLETIONS, json=HELLO)
    async with house() as (there, _):
        fleet = await there.client.post(COMPLETIONS, json=HELLO, headers={"X-Request-Id": "mine"})
        assert fleet.status_code == alone.status_code == 200
        assert fleet.json()["choices"] == alone.json()["choices"]
        assert fleet.json()["usage"] == alone.json()["usage"]
        assert fleet.headers["x-request-id"] == "mine"
        streamed = await there.client.post(COMPLETIONS, json={**HELLO, "stream": True})
        assert gist(events(streamed.text)) == alone.json()["choices"][0]["text"]
        wrong = await there.client.post(COMPLETIONS, json={**HELLO, "max_tokens": -1})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")
        assert (await there.client.get("/ready")).json() == {"status": "ok"}
        assert (await there.client.post("/ready")).status_code == 405
        assert (await there.client.get("/nowhere")).status_code == 404


async def test_turns_of_a_talk_go_to_one_replica(house: Any) -> None:
    async with house() as (there, _):
        for talk in range(4):
            said = [{"role": "user", "content": f"talk {talk} " * 20}]
            start = len(there.went)
            for _ in range(3):
                response = await there.client.post(CHAT, json={"messages": said, "max_tokens": 4})
                said += [response.json()["choices"][0]["message"], {"role": "user", "content": "go on"}]
                said[-2] = {"role": "assistant", "content": said[-2]["content"]}
            assert len(set(there.went[start:])) == 1
        assert len(set(there.went)) == 2, "talks that have nothing in common are shared out"


async def test_where_one_engine_is_dead_the_other_answers(house: Any, eventually: Any) -> None:
    async with house() as (there, engines):
        await there.client.post(COMPLETIONS, json=HELLO)
        first = there.went[0]
        engines[int(first[1])].die()
        life = there.replicas[first]._app.state.dispatcher.life
        await eventually(lambda: life.over)
        response = await there.client.post(COMPLETIONS, json=HELLO)
        assert response.status_code == 200
        assert there.went[1:] == [first, "r1" if first == "r0" else "r0"]
        with pytest.raises(EngineStartError, match="gone for good"):
            there.replicas[first].check_health()


async def test_who_hangs_up_aborts_his_request(house: Any, eventually: Any) -> None:
    async with house() as (there, engines):
        for engine in engines:
            engine.gate.clear()
        asking = asyncio.create_task(there.client.post(COMPLETIONS, json=HELLO))
        await eventually(lambda: any(engine.running for engine in engines))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await eventually(lambda: any(engine.aborted for engine in engines))


async def test_a_drain_waits_for_who_is_inside_and_no_longer_than_it_may(house: Any, eventually: Any) -> None:
    async with house(drain_timeout=0.2) as (there, engines):
        for engine in engines:
            engine.gate.clear()
        asking = asyncio.create_task(there.client.post(COMPLETIONS, json=HELLO))
        await eventually(lambda: any(engine.running for engine in engines))
        await there.replicas[there.went[0]].stop()
        for engine in engines:
            engine.gate.set()
        response = await asking  # cut off before its first byte: it began again at the other replica
        assert response.status_code == 200
        assert len(set(there.went)) == 2
        del there.replicas[there.went[0]]


async def test_what_a_replica_tells_of_itself(house: Any) -> None:
    async with house() as (there, _):
        replica = there.replicas["r0"]
        ready = replica._state.ready
        stats = replica.record_routing_stats()
        assert stats == {"capacity": ready.num_blocks * ready.block_size * 4 // CHUNK_BYTES, "engine": 0}
        assert replica.record_autoscaling_stats() == {"running": 0, "waiting": 0, "places": ready.max_num_seqs}
        replica.check_health()


async def test_load_is_that_of_the_engine_and_of_who_is_on_the_way(house: Any, eventually: Any) -> None:
    async with house() as (there, engines):
        for engine in engines:
            engine.gate.clear()
        asking = [asyncio.create_task(there.client.post(COMPLETIONS, json={**HELLO, "n": 3})) for _ in range(2)]
        await eventually(lambda: sum(engine.running for engine in engines) == 6)
        load = [replica.record_autoscaling_stats() for replica in there.replicas.values()]
        assert sum(one["running"] + one["waiting"] for one in load) == 6
        for engine in engines:
            engine.gate.set()
        await asyncio.gather(*asking)


async def test_an_engine_that_cannot_start_is_an_error(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(on_message: Any) -> None:
        raise EngineStartError("no such folder")

    monkeypatch.setattr(fake, "start", start)
    monkeypatch.setattr(fake, "close", lambda: None)
    with pytest.raises(EngineStartError, match="no such folder"):
        await Replica("r0", fake, ServerConfig()).start()


async def test_keys_hold_at_every_replica(house: Any) -> None:
    async with house(api_key=("secret",)) as (there, _):
        assert (await there.client.post(COMPLETIONS, json=HELLO)).status_code == 401
        good = {"Authorization": "Bearer secret"}
        assert (await there.client.post(COMPLETIONS, json=HELLO, headers=good)).status_code == 200
        page = (await there.client.get("/metrics")).text
        assert set(re.findall(r'replica="(\w+)"', page)) == {"r0", "r1"}
        found = await there.client.post("/abort_requests", json={"request_ids": ["a"]}, headers=good)
        assert json.loads(found.text) == {"aborted": []}
