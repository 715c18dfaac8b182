"""The way in: reads a request, has a replica answer it, and sees to it that a lost replica costs as little as possible.

    client ──▶ read_call ──▶ ask ──▶ the replica that the router chose
                              ▲  refused with 503, or lost before a byte of it: another one
                              └─ lost later: an error event, and the end

Until the first byte of an answer nobody has seen anything of it, so that it may begin again elsewhere. Later it may
not, for another replica draws other tokens. Knows nothing of Ray.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Any, cast

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ...server import errors, sse
from ...server.connection import ClientGone, while_connected
from ...server.logs import logger
from .call import Ask, Call, Everyone, ReplicaLost, read_call
from .merged import PATHS, answer_of_all

ATTEMPTS = (
    4  # replicas that one request is offered to: to lose a second one at the same time is rare, a fourth has a reason
)


class Ingress:
    """An ASGI application. `lost` counts answers that broke off, `repeated` requests that began again elsewhere."""

    def __init__(self, ask: Ask, everyone: Everyone, max_body_bytes: int) -> None:
        self.lost = 0
        self.repeated = 0
        self._ask = ask
        self._everyone = everyone
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        try:
            call = await read_call(scope, receive, self._max_body_bytes)
            if call is not None:
                await while_connected(receive, self._answer(call, scope, receive, send))
        except errors.ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
        except ClientGone:
            logger.debug("a client left before its answer was complete")

    async def _answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        if call.path in PATHS:
            status, kind, body = await answer_of_all(call, self._everyone)
            await Response(body, status, media_type=kind)(scope, receive, send)
            return
        for attempt in range(1, ATTEMPTS + 1):
            status = 0
            try:
                async with aclosing(cast(Any, self._ask(call))) as parts:
                    async for replica, messages in parts:
                        if not status:
                            status, streams = _opening(messages)
                            if status == 503 and attempt < ATTEMPTS and replica not in call.avoid:
                                call = call._replace(avoid=(*call.avoid, replica))
                                break
                        for message in messages:
                            await send(message)
                    else:
                        return
            except ReplicaLost as lost:
                if status:
                    self.lost += 1
                    logger.warning("an answer broke off: %s", lost)
                    await _break_off(call.path, streams, send)
                    return
                logger.warning("a request begins again: %s", lost)
            self.repeated += 1
        raise errors.engine_dead()


async def _live(receive: Receive, send: Send) -> None:
    """ASGI's lifespan: nothing has to be started."""
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


def _opening(messages: list[Message]) -> tuple[int, bool]:
    """The status of an answer, and whether it is a stream of events."""
    start = messages[0]
    return start["status"], any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"]
    )


async def _break_off(path: str, streams: bool, send: Send) -> None:
    """A stream never ends in silence. A whole answer that is cut off does: the connection closes on it."""
    if not streams:
        raise RuntimeError("an answer broke off")
    await send({"type": "http.response.body", "body": last_words(path, errors.engine_dead()), "more_body": False})


def last_words(path: str, error: errors.ApiError) -> bytes:
    """The end of a stream that an error ends, in the shape of the API that `path` belongs to."""
    body = error.body(path)
    if path.startswith(errors.ANTHROPIC):
        return sse.named_event(body)
    if path.startswith("/v1/responses"):
        return sse.named_event({"type": "error", "code": error.code, "message": error.message, "param": None})
    return sse.event(body) + sse.DONE
