"""The visitor and the flood against a scripted server on a real port."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from quire.bench.client import ServerError
from quire.bench.fairness import FairnessConfig, run, table

PAUSE = 0.002  # seconds before each token


class Script:
    """Gives one token after another; tenants of `slow` wait so many seconds for their first."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.slow: dict[str, float] = {}
        self.status = 200

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "max_model_len": 512}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": [1, 2, 3]})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "unknown tenant"}}, status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(self.slow.get(body["tenant"], 0.0))
        count = body["max_tokens"]
        choices: list[Any] = [[{"text": "x", "finish_reason": None}]] * (count - 1)
        events = [{"choices": c} for c in [*choices, [{"text": "x", "finish_reason": "length"}]]]
        events.append({"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}})
        for event in [*map(json.dumps, events), "[DONE]"]:
            await asyncio.sleep(PAUSE)
            await response.write(f"data: {event}\n\n".encode())
        return response


@pytest.fixture
def server() -> Iterator[tuple[str, Script]]:
    script = Script()
    started: queue.SimpleQueue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", script.models)
        app.router.add_post("/tokenize", script.tokenize)
        app.router.add_post("/v1/completions", script.generate)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        done = asyncio.Event()
        started.put((f"http://127.0.0.1:{runner.addresses[0][1]}", asyncio.get_running_loop(), done))
        await done.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    url, loop, done = started.get(timeout=10)
    yield url, script
    loop.call_soon_threadsafe(done.set)
    thread.join()


def config(url: str, **changes: Any) -> FairnessConfig:
    small = {"flood_requests": 5, "flood_output_len": 4, "visits": 6, "visit_output_len": 2, "visit_rate": 100.0}
    return FairnessConfig(url=url, **small | changes)


def test_both_tenants_are_told_and_the_visits_are_timed(server: tuple[str, Script]) -> None:
    url, script = server
    script.slow = {"flood": 30.0}
    result = run(config(url))
    assert [body["tenant"] for body in script.bodies].count("flood") == 5
    assert [body["tenant"] for body in script.bodies].count("visitor") == 12
    lengths = {body["tenant"]: (len(body["prompt"]), body["max_tokens"]) for body in script.bodies}
    assert lengths == {"flood": (381, 4), "visitor": (128, 2)}
    assert result["visits_during_flood"] == {"server": 6}
    assert result["flooded_p95_ttft_ms"]["server"] > 0
    assert table(result).row_count == 2


def test_a_flood_that_is_over_does_not_count(server: tuple[str, Script]) -> None:
    url, _ = server
    result = run(config(url, visit_rate=4.0))
    assert result["visits_during_flood"]["server"] < 6


def test_a_refusal_is_told(server: tuple[str, Script]) -> None:
    url, script = server
    script.status = 400
    with pytest.raises(ServerError, match="HTTP 400"):
        run(config(url))
