"""Server-sent events: the frames, and the response that writes them for as long as somebody reads.

data: {json}\\n\\n  …  data: [DONE]\\n\\n          : keep-alive\\n\\n
event: name\\ndata: {json}\\n\\n  …
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .connection import while_connected
from .http_protocol import WRITE_NOW

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


def event(payload: Any) -> bytes:
    """One `data:` frame. JSON escapes every line break, so the frame cannot be torn by the text it carries."""
    return b"data: " + _encode(payload) + b"\n\n"


def named_event(payload: dict[str, Any]) -> bytes:
    """The same with the payload's own `type` as the frame's name."""
    name: str = payload["type"]
    return b"event: " + name.encode() + b"\ndata: " + _encode(payload) + b"\n\n"


class EventStream(Response):
    """Writes what `frames` yields; ends when the client leaves, or is cut off because it does not read
    (`http_protocol.py`).

    Headers go out with the first frame: what `frames` raises before it can still become another answer.
    `owner` is entered for the life of the response and left in every case, also when `frames` was never started.
    A slow reader holds up nobody: while a write blocks, the tokens of its request merge in their mailbox. One that
    reads is written to directly where the server offers it: ASGI's `send` is a tower of calls.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes], owner: AbstractContextManager[object]) -> None:
        # "no": or nginx collects the stream and hands it over at its end.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._owner = owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._owner:
            await while_connected(receive, self._write(send, scope.get("state", {}).get(WRITE_NOW, _cannot)))

    async def _write(self, send: Send, write_now: Callable[[bytes], bool]) -> None:
        begun = False
        async with aclosing(self._frames) as frames:
            async for frame in frames:
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                if not write_now(frame):
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _cannot(frame: bytes) -> bool:
    return False
