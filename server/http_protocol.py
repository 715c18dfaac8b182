"""uvicorn's HTTP protocol with bounds on what comes before a request exists: size, count and time of its headers."""

from __future__ import annotations

import asyncio

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from . import errors

MAX_HEADER_BYTES = 16 * 1024  # as nginx and Node; a long bearer token is 2 KiB
MAX_HEADERS = 100
LINGER_SECONDS = 5.0  # for the rest of a body whose request has been answered: closing at once would lose the answer
HEADER_SECONDS = 10.0  # from the connection, or from a request's first byte: a person's client needs milliseconds


class BoundedProtocol(HttpToolsProtocol):
    """431 past the size, 400 for what is not HTTP, and silence for who takes longer than HEADER_SECONDS.

    A request that was refused before its body was read is sent on for LINGER_SECONDS at most, and read by nobody.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refusal: errors.ApiError | None = None
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._body_is_in = True
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_in()
        self._stop_lingering()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._header_timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(_headers_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._body_is_in = False
        self._expect_headers()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._body_is_in = True
        self._stop_lingering()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        begun_anew = self._header_timer is not None or not self.cycle.response_complete
        if not self._body_is_in and not begun_anew:
            self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        self._headers_are_in()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = _headers_too_large()
            raise ValueError("headers too large")  # stops the parser, which calls send_400_response
        super().on_headers_complete()

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

    def _stop_lingering(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _refuse(self, error: errors.ApiError) -> None:
        self._headers_are_in()
        content = msgspec.json.encode(error.body())
        head = (
            f"HTTP/1.1 {error.status} Refused\r\ncontent-type: {errors.JSON}\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()


def _headers_too_large() -> errors.ApiError:
    message = f"The request's headers are larger than {MAX_HEADER_BYTES} bytes or more than {MAX_HEADERS}."
    return errors.ApiError(431, message, code="headers_too_large")
