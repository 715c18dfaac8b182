"""An OpenAI server that says what a test wants it to say, on a real port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

PAUSE = 0.002  # between tokens


class Script:
    """A model that says "x" max_tokens times; `spoil` may change the events of one request."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.prompt = self.generation = 0
        self.uncounted = 0  # added to what /metrics shows after the first look
        self.status: Callable[[int], int] = lambda number: 200
        self.spoil: Callable[[int, list[str]], list[str]] = lambda number, events: events

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "max_model_len": 512}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        words = (await request.json())["prompt"].split()
        return web.json_response({"tokens": [i + 10 for i in range(len(words))], "count": len(words)})

    async def metrics(self, request: web.Request) -> web.Response:
        counts = {"quire_prompt_tokens": self.prompt, "quire_generation_tokens": self.generation}
        lines = [f"# TYPE {name}_total counter\n{name}_total {value}\n" for name, value in counts.items()]
        self.prompt += self.uncounted
        return web.Response(text="".join(lines))

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        if (status := self.status(number)) != 200:
            return web.json_response({"error": {"message": "full"}}, status=status)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in self.spoil(number, self.events(body)):
            await asyncio.sleep(PAUSE)
            if event == "cut":
                assert request.transport is not None
                request.transport.abort()
                break
            await response.write(f"data: {event}\n\n".encode())
        self.in_flight -= 1
        return response

    def events(self, body: dict[str, Any]) -> list[str]:
        count = body["max_tokens"]
        prompt = len(body["prompt"]) if "prompt" in body else len(body["messages"][0]["content"].split())
        self.prompt += prompt
        self.generation += count

        def choice(text: str, end: str | None) -> str:
            said = {"text": text} if "prompt" in body else {"delta": {"content": text}}
            return json.dumps({"choices": [{"index": 0, **said, "finish_reason": end}]})

        usage = {"prompt_tokens": prompt, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 1}}
        last = json.dumps({"choices": [], "usage": usage})
        opening = [] if "prompt" in body else [choice("", None)]
        return [*opening, *[choice("x", None)] * (count - 1), choice("x", "length"), last, "[DONE]"]


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/v1/models", script.models)
    app.router.add_post("/tokenize", script.tokenize)
    app.router.add_get("/metrics", script.metrics)
    app.router.add_post("/v1/completions", script.generate)
    app.router.add_post("/v1/chat/completions", script.generate)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()
