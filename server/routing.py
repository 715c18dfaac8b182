"""What every route does before its handler: look up its policy, check the key, read the body within its limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from . import errors
from .auth import POLICIES, Door, Policy
from .state import state_of

# A body of this size takes a millisecond to decode. Larger ones are decoded on a text thread: those that come together
# take turns with the event loop.
LARGE_BODY_BYTES = 64 * 1024
# Of all objects in a body together. The longest conversation that is taken has fewer; millions are half a second of
# everybody's time.
MAX_KEYS = 65_536
MAX_CONTAINERS = 65_536  # objects and lists; those that mean something have keys, and most have several
MAX_FIELDS = 1024  # of the body itself: ten times those that are known; each is looked up on the event loop
COUNTED_BYTES = 64 * 1024  # that are counted at once, in up to 2 ms: other threads wait that long
BODY_SECONDS = 30.0  # for a whole body: 2 MiB at half a megabit per second


class GuardedRoute(APIRoute):
    """A route that exists only if the policy table knows its path: an unknown one fails when the app is built.

    The policy hangs on the path that was *declared*, so no trick with the Host header or the raw path moves it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        policy = POLICIES[self.path]
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            _let_in(request, policy)
            if policy.has_body:
                request = await _JsonRequest.read(request, state_of(request).config.max_body_bytes)
            return await handler(request)

        return guarded


def _let_in(request: Request, policy: Policy) -> None:
    """Find out who calls: `request.state.caller`. Raises 401 or 403 by the key, 429 by its requests a minute."""
    door: Door = request.app.state.door
    address = request.client.host if request.client is not None else ""
    caller = request.state.caller = door.check(policy, request.headers, address)
    try:
        door.count(policy, caller)
    except errors.ApiError as error:
        state_of(request).metrics.tenant_refused(caller.name, error.code)
        raise


class _JsonRequest(Request):
    """A request whose body has been read, bounded and decoded by strict JSON rules: no NaN, no lone surrogates."""

    content: Any
    raw: bytes

    @classmethod
    async def read(cls, request: Request, limit: int) -> _JsonRequest:
        """Raises 413 past `limit` bytes, 408 if they trickle, 415 for anything but JSON, 400 if it is malformed."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != errors.JSON:
            raise errors.unsupported_media_type("send the body as `application/json`.")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise errors.unsupported_media_type("send the body uncompressed.")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise errors.too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise errors.too_large(limit)
                    parts.append(part)
        except TimeoutError:
            raise errors.body_too_slow(BODY_SECONDS) from None
        decoded = cls(request.scope, request.receive)
        raw = decoded.raw = b"".join(parts)
        small = size <= LARGE_BODY_BYTES
        decoded.content = _decode(raw) if small else await state_of(request).in_pool(lambda: _decode(raw))
        return decoded

    async def body(self) -> bytes:
        return self.raw

    async def json(self) -> Any:
        return self.content


def _decode(raw: bytes) -> Any:
    if not raw.strip():
        raise errors.invalid("The request body is empty; send a JSON object.")
    _check_structure(raw)
    try:
        content = msgspec.json.decode(raw)
    except RecursionError:
        raise errors.invalid("The request body is nested too deeply.") from None
    except msgspec.ValidationError:  # numbers beyond every type
        raise errors.invalid("The request body holds a number that is out of range.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise errors.invalid(f"The request body is not valid JSON: {_reason(error)}.") from None
    if not isinstance(content, dict):
        raise errors.invalid("The request body must be a JSON object.")
    if len(content) > MAX_FIELDS:
        raise errors.invalid(
            f"The request body has {len(content)} fields; at most {MAX_FIELDS} are taken: leave some out."
        )
    return content


def _check_structure(raw: bytes) -> None:
    """Raises 400 for more keys, or more objects and lists, than are taken, before they are made.

    Objects and lists count where they end: those that do not are inside each other, and refused as nested too deeply.
    """
    if raw.count(b":") <= MAX_KEYS and raw.count(b"}") + raw.count(b"]") <= MAX_CONTAINERS:
        return  # whatever of these is text
    keys = containers = in_text = 0
    marks = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote that is left begins or ends a text
    for start in range(0, len(marks), COUNTED_BYTES):
        parts = marks[start : start + COUNTED_BYTES].split(b'"')
        outside = b"".join(parts[in_text::2])
        in_text ^= (len(parts) - 1) & 1
        keys += outside.count(b":")
        containers += outside.count(b"}") + outside.count(b"]")
        if keys > MAX_KEYS:
            raise errors.invalid(f"The request body has more than {MAX_KEYS} keys; send less in a request.")
        if containers > MAX_CONTAINERS:
            raise errors.invalid(
                f"The request body has more than {MAX_CONTAINERS} objects and lists; send less in a request."
            )


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return str(error).removeprefix("JSON is malformed: ")
