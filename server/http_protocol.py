"""uvicorn's HTTP protocol with bounds on what comes before a request exists: size, count and time of its headers.

And with a short way out: `scope["extensions"][WRITE_NOW]` writes a piece of a chunked body without a turn of any kind.
"""

from __future__ import annotations

import asyncio
from functools import partial

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from . import errors

MAX_HEADER_BYTES = 16 * 1024  # as nginx and Node; a long bearer token is 2 KiB
MAX_HEADERS = 100
WRITE_NOW = "quire.write_now"  # Callable[[bytes], bool]; False: nothing was written, use ASGI's `send`, which can wait
HEADER_SECONDS = 10.0  # from the connection, or from a request's first byte: a person's client needs milliseconds


class BoundedProtocol(HttpToolsProtocol):
    """431 past the size, 400 for what is not HTTP, and silence for who takes longer than HEADER_SECONDS."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refusal: errors.ApiError | None = None
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_in()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._header_timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(_headers_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        self._headers_are_in()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = _headers_too_large()
            raise ValueError("headers too large")  # stops the parser, which calls send_400_response
        super().on_headers_complete()
        if self.cycle is not None:
            self.scope["extensions"] = {WRITE_NOW: partial(_write_now, self.cycle)}

    def send_400_response(self, msg: str) -> None:
        malformed = errors.ApiError(400, "This is not a valid HTTP request.", code="invalid_http")
        self._refuse(self._refusal or malformed)

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_bytes = 0
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _headers_are_in(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self, error: errors.ApiError) -> None:
        self._headers_are_in()
        content = msgspec.json.encode(error.body())
        head = (
            f"HTTP/1.1 {error.status} Refused\r\ncontent-type: {errors.JSON}\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()


def _write_now(cycle: RequestResponseCycle, body: bytes) -> bool:
    """See WRITE_NOW: what `cycle.send` does with a piece of a body that the connection can take."""
    if cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True


def _headers_too_large() -> errors.ApiError:
    message = f"The request's headers are larger than {MAX_HEADER_BYTES} bytes or more than {MAX_HEADERS}."
    return errors.ApiError(431, message, code="headers_too_large")
