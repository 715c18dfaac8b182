"""What crosses between the ingress and a replica: an HTTP request whole, its answer in ASGI's messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from ...server import errors
from .prefix import Chain, chain_of


class Call(NamedTuple):
    """An HTTP request.

    client  address and port of who sent it
    chain   what its prompt begins with; empty = it has none, or none that could be read
    avoid   replicas that have refused it
    """

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes
    chain: Chain = ()
    avoid: tuple[str, ...] = ()

    def scope(self) -> dict[str, Any]:
        """As ASGI has it, for the application."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": self.headers,
            "client": self.client,
            "server": None,
            "state": {},
        }


class Part(NamedTuple):
    """What a replica has answered since its last part."""

    replica: str
    messages: list[Message]


class ReplicaLost(Exception):
    """The replica that was to answer is gone, or nobody is there to answer."""


Ask = Callable[[Call], AsyncIterator[Part]]  # of one replica; raises ReplicaLost
Everyone = Callable[[Call], Awaitable[list[tuple[str, int, bytes]]]]  # (replica, status, body) of all that answer


async def read_call(scope: Scope, receive: Receive, max_body_bytes: int) -> Call | None:
    """The request with its body; None if the client left meanwhile. Raises 413."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_body_bytes:
            raise errors.too_large(max_body_bytes)
        if not message.get("more_body", False):
            break
    body = b"".join(parts)
    return Call(
        method=scope["method"],
        path=scope["path"],
        query=scope["query_string"],
        headers=list(scope["headers"]),
        client=tuple(scope["client"]) if scope.get("client") else None,
        body=body,
        chain=_chain(body, Headers(scope=scope)),
    )


def _chain(body: bytes, headers: Mapping[str, str]) -> Chain:
    """Whatever is wrong with a body is the application's to say."""
    try:
        content = msgspec.json.decode(body) if body else None
        return chain_of(content, headers) if isinstance(content, dict) else ()
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return ()
