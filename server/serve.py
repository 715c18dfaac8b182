"""Run the server until it is told to stop, and stop it gently.

first SIGTERM or SIGINT   /ready says 503, new requests get 503, running ones finish within drain_timeout
second                    now; any further one changes nothing
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..engine.client import EngineClient
from ..engine.start_bar import StartBar
from . import errors, logs
from .app import create_app
from .config import ServerConfig
from .dispatcher import Dispatcher
from .http_protocol import bounded_protocol
from .logs import logger
from .probes import Probes

CLOSE_SECONDS = 5  # for the last error events to reach their readers, once everything has been aborted

# Between two looks for garbage, where Python's own number is 700. A large body decodes to as many containers: with 700
# the collector takes six times as long as decoding itself.
YOUNG_OBJECTS = 50_000

# glibc gives threads arenas of their own, and what one thread frees of another's stays in pieces: prompts of random
# length cost 400 bytes each for good, and in one arena none after the first 6,000.
M_ARENA_MAX = -8  # of malloc.h
ARENAS = 1

KEEP_ALIVE_SECONDS = 65  # longer than the usual proxy's 60: whoever closes first must be the one who knows it


class SettingsRefused(Exception):
    """What was asked for cannot be; the reason has been logged, and no port was ever open."""


def serve(client: EngineClient, config: ServerConfig) -> bool:
    """Start `client`, and listen; returns when stopped. False if the start failed or the engine is gone for good.

    The port opens when the engine's settings are known to be right; before, what is wrong with them is logged, and
    SettingsRefused raised. From here on SIGTERM and SIGINT are the server's, and after it nobody's: the process is to
    end, and a late one shall not break that off.
    """
    logs.setup(config.log_level, config.log_json)
    _bound_arenas()
    try:
        server = _Server(client, config)
    except OSError as error:
        logger.error("cannot start: nothing can listen on health_port %s: %s", config.health_port, error.strerror)
        return False
    _on_signals(server.handle_exit)
    try:
        server.run()
        return server.told_to_stop or not server.engine_is_gone
    except SystemExit:  # uvicorn's word for a failed start; the reason has been logged
        if server.refused and not server.told_to_stop:
            raise SettingsRefused from None
        return server.told_to_stop
    finally:
        server.close_bar()
        if server.probes is not None:
            server.probes.stop()
        _on_signals(signal.SIG_IGN)  # a handler of ours would give way to the default one when the interpreter ends


def _bound_arenas() -> None:
    """Of threads that begin from here on; nothing where the C library is another one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, ARENAS)


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)


def _settle_memory() -> None:
    """What is there now stays: a full collection need not walk it, which halts every stream for tens of milliseconds.
    And a large body is no garbage because many objects are made of it at once.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


class _Server(uvicorn.Server):
    def __init__(self, client: EngineClient, config: ServerConfig) -> None:
        self._client = client
        self._app = create_app(client, config)
        self._dispatcher: Dispatcher = self._app.state.dispatcher
        self.probes = None if config.health_port is None else Probes(self._app, config, config.health_port)
        self._drain_timeout = config.drain_timeout
        self.told_to_stop = False
        self._stopping: asyncio.Task[None] | None = None
        self._bar = StartBar()
        self._hurry = asyncio.Event()
        super().__init__(
            uvicorn.Config(
                self._app,
                host=config.host,
                port=config.port,
                http=bounded_protocol(config),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )

    def close_bar(self) -> None:
        """The cursor is the shell's again."""
        self._bar.close()

    @property
    def refused(self) -> bool:
        return bool(self._app.state.refused)

    @property
    def engine_is_gone(self) -> bool:
        return self._dispatcher.life.over

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        _settle_memory()
        if self.started:
            logger.info("listening on http://%s:%d", self.config.host, _port(self) or self.config.port)
        if self.probes is not None:
            self.probes.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.feed.close()  # whoever watches would have it wait for them
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; True ends the server."""
        self._bar.tell(self._dispatcher.life.progress)
        return await super().on_tick(counter) or self.engine_is_gone

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's: that one closes the port first, and lets the signal kill the process in the end."""
        self.told_to_stop = True
        if not self.started:
            self.should_exit = True
            self._dispatcher.stopping = True
            threading.Thread(target=self._client.close).start()  # ends the start that the main thread waits for
        else:
            with contextlib.suppress(RuntimeError):  # the loop has closed: it is all over but the exit
                self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._drain())
        else:
            self._hurry.set()

    async def _drain(self) -> None:
        state = self._app.state.quire
        if state is None:  # nobody could have begun anything
            self.should_exit = True
            return
        logger.info("stopping: %d requests may finish within %g s", state.admission.requests, self._drain_timeout)
        drained = asyncio.ensure_future(state.admission.drain(self._drain_timeout))
        hurried = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        drained.cancel()
        if state.admission.requests:
            logger.warning("stopping: %d requests are cut off", state.admission.requests)
            self._dispatcher.fail_all(errors.draining())
        self.should_exit = True


def _port(server: uvicorn.Server) -> int | None:
    """The one that was found, where any free one was asked for."""
    return next((int(listener.getsockname()[1]) for one in server.servers for listener in one.sockets), None)
