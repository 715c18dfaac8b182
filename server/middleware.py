"""The outermost layer: a request's id, its line in the log, its place in the metrics, and the last word on errors."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import errors, logs
from .auth import POLICIES
from .connection import ClientGone
from .keys import INFER
from .load import ASKED_BY, orca_headers
from .logs import logger
from .quotas import Quotas

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"})
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
CLIENT_GONE = 499  # nginx's number for it; nobody receives it, but logs and metrics do


class Outermost:
    """Pure ASGI, so that nothing lies between a streaming response and the socket.

    The caller's X-Request-Id is echoed if it is harmless, and replaced if not; it is a label, never a handle.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: frozenset[str]) -> None:
        """`allowed_hosts`: names accepted in the Host header; empty = all."""
        self._app = app
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        offered = headers.get("x-request-id", "")
        request_id = offered if REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
        arrival = time.monotonic()
        scope.setdefault("state", {}).update(request_id=request_id, arrival=arrival)
        status = 0

        wants_load = headers.get(ASKED_BY, "")

        async def tagged_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if scope["path"].startswith(errors.ANTHROPIC):
                    headers["Request-Id"] = request_id
                headers.update(_quota_headers(scope))
                if wants_load:
                    headers.update(_load_headers(scope, wants_load))
            await send(message)

        try:
            if self._allowed_hosts and _host_name(headers.get("host", "")) not in self._allowed_hosts:
                await errors.host_not_allowed().response(scope["path"])(scope, receive, tagged_send)
            else:
                await self._app(scope, receive, tagged_send)
        except (ClientGone, ClientDisconnect):
            status = CLIENT_GONE
        except Exception as error:
            logger.error("request %s failed: %s", request_id, logs.where(error))
            if status == 0:
                await errors.internal().response(scope["path"])(scope, receive, tagged_send)
            status = 500
        finally:
            self._account(scope, status or CLIENT_GONE, time.monotonic() - arrival)

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        handler = route if route in POLICIES else "other"
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        state: Any = getattr(scope["app"].state, "quire", None) if "app" in scope else None
        if state is not None:
            state.metrics.http(method, handler, status, seconds)
            if scope["app"].state.tracer is not None:
                scope["app"].state.tracer.record(route, Headers(scope=scope), scope["state"], status)
        if not (handler in POLICIES and POLICIES[handler].probe):
            where = route if handler == route else errors.shown(scope["path"])  # a name in a path stays out of the log
            logger.info("%s %s %d %.3fs id=%s", method, where, status, seconds, scope["state"]["request_id"])


def _quota_headers(scope: Scope) -> Mapping[str, str]:
    """What is left of the caller's minute, where a route has found out who it is. Not on probes: another thread may
    answer them, and the accounts belong to the first one.
    """
    caller = scope["state"].get("caller")
    if caller is None or POLICIES[scope["route"].path].probe:
        return {}
    quotas: Quotas = scope["app"].state.door.quotas
    return quotas.headers(caller)


def _load_headers(scope: Scope, format: str) -> Mapping[str, str]:
    """Figures of the engine, for a caller who has been let in by a key."""
    caller, state = scope["state"].get("caller"), scope["app"].state.quire
    if caller is None or INFER not in caller.scopes or state is None:
        return {}
    return orca_headers(format, state.metrics.stats)


def _host_name(host: str) -> str:
    """The Host header without its port, in lower case."""
    name, _, port = host.lower().rpartition(":")
    return name if name and port.isdecimal() else host.lower()
