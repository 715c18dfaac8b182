"""One replica: the application of `server/app.py` and its engine, reached by calls instead of by a port.

    answer(call) ──▶ the application ──messages──▶ Outbox ──▶ parts, each all that was sent since the last one

Knows nothing of Ray, which makes an actor of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.types import Message

from ...engine.client import EngineClient
from ...engine.config import EngineConfig
from ...engine.errors import EngineStartError
from ...server import errors, logs
from ...server.app import create_app
from ...server.config import ServerConfig
from ...server.state import State
from .call import Call, Part
from .prefix import CHUNK_BYTES

LOOK = 0.1  # seconds between looks at a start that takes at least as many seconds

BYTES_PER_TOKEN = 4  # of English text; more in a CHUNK_BYTES than there are would only mean that less is remembered


class Replica:
    """`name`: what routers know it by. `start` before everything else, `stop` after it."""

    def __init__(self, name: str, client: EngineClient, config: ServerConfig) -> None:
        logs.setup(config.log_level, config.log_json)
        self.name = name
        self._drain_timeout = config.drain_timeout
        self._app = create_app(client, config)
        self._lifespan = self._app.router.lifespan_context(self._app)

    @property
    def _state(self) -> State:
        state: State = self._app.state.quire
        return state

    async def start(self) -> None:
        """Until it serves. Raises EngineStartError."""
        await self._lifespan.__aenter__()
        life = self._app.state.dispatcher.life
        while self._app.state.quire is None or life.trouble() == "starting":
            if life.over:
                await self._lifespan.__aexit__(None, None, None)
                raise EngineStartError("the engine could not be started; the log says why")
            await asyncio.sleep(LOOK)

    async def stop(self) -> None:
        """As a server at SIGTERM: nobody is let in any more, and those inside may finish within the drain time."""
        if self._app.state.quire is not None and not await self._state.admission.drain(self._drain_timeout):
            self._app.state.dispatcher.fail_all(errors.draining())
        await self._lifespan.__aexit__(None, None, None)

    def check_health(self) -> None:
        """Raises EngineStartError where only another replica helps: an engine that ends is started again in here."""
        if self._app.state.dispatcher.life.over:
            raise EngineStartError("the engine is gone for good")

    def record_routing_stats(self) -> dict[str, int]:
        """What routers want to know: room for so many chunks of prefix, in the cache of the so-many-th engine."""
        ready = self._state.ready
        return {
            "capacity": ready.num_blocks * ready.block_size * BYTES_PER_TOKEN // CHUNK_BYTES,
            "engine": sum(self._app.state.dispatcher.life.restarts.values()),
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The engine's own queue, and what was let in and has not reached it: the fields of `autoscaling.Load`."""
        state = self._state
        running = state.metrics.stats.running
        return {
            "running": running,
            "waiting": max(state.admission.open - running, 0),
            "places": state.ready.max_num_seqs,
        }

    async def answer(self, call: Call) -> AsyncGenerator[Part]:
        """Parts of the answer, until it is complete. Whoever closes the generator before has hung up."""
        outbox, gone = Outbox(), asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(call.scope(), receive, outbox.send)
            finally:
                outbox.close()

        work = asyncio.create_task(run())
        try:
            while messages := await outbox.take():
                yield Part(self.name, messages)
        finally:
            gone.set()
            with contextlib.suppress(asyncio.CancelledError):  # hung up: the application ends by itself
                await asyncio.shield(work)

    async def whole(self, call: Call) -> tuple[str, int, bytes]:
        """The whole answer: who gives it, its status and its body."""
        messages = [message async for part in self.answer(call) for message in part.messages]
        return self.name, messages[0]["status"], b"".join(message.get("body", b"") for message in messages)


class Outbox:
    """Messages that wait for whoever takes them: all at a time, so that who is slow gets fewer, longer parts."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._news = asyncio.Event()
        self._closed = False

    async def send(self, message: Message) -> None:
        self._messages.append(message)
        self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def take(self) -> list[Message]:
        """What has come since the last call; empty when nothing will come any more."""
        await self._news.wait()
        messages, self._messages = self._messages, []
        if not self._closed:
            self._news.clear()
        return messages


def engine_client(engine: EngineConfig, config: ServerConfig) -> EngineClient:
    """An engine in a process of its own, watched and started again: what `quire serve` runs."""
    from ...engine.process import ProcessClient
    from ...engine.supervisor import Supervisor

    return Supervisor(ProcessClient, engine, hang_timeout=config.hang_timeout, max_restarts=config.max_engine_restarts)
