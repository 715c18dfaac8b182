"""The probes on a port of their own: answered by a second event loop on a thread of its own.

What keeps the first one busy (hundreds of streams, a flood of requests, a handler that blocks) does not delay them.
They are the same routes of the same application: here and there the same answers, keys and bounds.
"""

from __future__ import annotations

import socket
import threading

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from . import errors
from .auth import POLICIES
from .config import ServerConfig
from .http_protocol import bounded_protocol

JOIN_SECONDS = 5.0


class Probes:
    """Listens from `start` to `stop`. Raises OSError at once where the port cannot be had."""

    def __init__(self, app: ASGIApp, config: ServerConfig, port: int) -> None:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self._listener = socket.create_server((config.host, port), family=family)
        self._server = uvicorn.Server(
            uvicorn.Config(
                _probes_of(app),
                http=bounded_protocol(config),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), name="probes", daemon=True)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(JOIN_SECONDS)
        self._listener.close()


def _probes_of(app: ASGIApp) -> ASGIApp:
    """`app` as far as it answers probes. Those wait for nothing, so any event loop can run them; other routes wait for
    what belongs to the first.
    """

    async def probes(scope: Scope, receive: Receive, send: Send) -> None:
        policy = POLICIES.get(scope["path"])
        if policy is None or not policy.probe:
            await errors.from_status(404).response()(scope, receive, send)
        else:
            await app(scope, receive, send)

    return probes
