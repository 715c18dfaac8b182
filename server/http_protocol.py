"""uvicorn's HTTP protocol with bounds: on connections, on headers in size and time, on how long a client may not read.

And with a short way out: `scope["state"][WRITE_NOW]` writes a piece of a chunked body without a turn of any kind.
"""

from __future__ import annotations

import asyncio
from functools import partial
from weakref import ref

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from . import errors
from .config import ServerConfig

WRITE_NOW = "write_now"  # Callable[[bytes], bool]; False: nothing was written, use ASGI's `send`, which can wait
MAX_HEADER_BYTES = 16 * 1024  # as nginx and Node; a long bearer token is 2 KiB
MAX_HEADERS = 100
REST_SECONDS = 5.0  # for the rest of a body whose request has been answered: closed at once, the answer would be lost
HEADER_SECONDS = 10.0  # from the connection, or from a request's first byte: a person's client needs milliseconds


LINGER_SECONDS = 1.0  # a refused client may still be sending: closed at once, it would see a reset, and no answer

_DEFAULTS = ServerConfig()


def bounded_protocol(config: ServerConfig) -> type[BoundedProtocol]:
    """The protocol with the bounds of `config`: uvicorn makes an instance for each connection."""

    class Protocol(BoundedProtocol):
        max_connections = config.max_connections
        write_timeout = config.write_timeout

    return Protocol


class BoundedProtocol(HttpToolsProtocol):
    """503 past max_connections, 431 past the size of headers, 400 for what is not HTTP; silence for who takes longer
    than HEADER_SECONDS to send them, or reads nothing for `write_timeout` seconds.

    The body of a request that was refused before it was read may go on for REST_SECONDS; nobody reads it.
    """

    max_connections = _DEFAULTS.max_connections
    write_timeout = _DEFAULTS.write_timeout

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refusal: errors.ApiError | None = None
        self._refused = False
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        self._body_is_in = True
        self._write_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > 2 * self.max_connections:  # those that were told, and do not leave
            transport.abort()
        elif len(self.connections) > self.max_connections:
            self._refuse(errors.too_many_connections(self.max_connections))
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_in()
        self._rest_is_in()
        self._reads_again()
        super().connection_lost(exc)
        self.cycle = self.scope = None  # type: ignore[assignment]

    def pause_writing(self) -> None:
        """What the client has not read fills the transport's buffer: whatever writes to it waits."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._reads_again()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._header_timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(errors.headers_too_large(MAX_HEADER_BYTES, MAX_HEADERS))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._body_is_in = False
        self._expect_headers()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._body_is_in = True
        self._rest_is_in()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is None:
            return
        begun_anew = self._header_timer is not None or not self.cycle.response_complete
        if not self._body_is_in and not begun_anew:
            self._rest_timer = self.loop.call_later(REST_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        self._headers_are_in()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = errors.headers_too_large(MAX_HEADER_BYTES, MAX_HEADERS)
            raise ValueError("headers too large")  # stops the parser, which calls send_400_response
        super().on_headers_complete()
        self.scope["state"][WRITE_NOW] = partial(_write_now, ref(self.cycle))

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or errors.invalid_http())

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_bytes = 0
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _headers_are_in(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _rest_is_in(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _reads_again(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _refuse(self, error: errors.ApiError) -> None:
        """Answer before there is a request; what the client still sends is not looked at."""
        self._headers_are_in()
        self._refused = True
        content = msgspec.json.encode(error.body())
        fields = {
            "content-type": errors.JSON,
            "content-length": str(len(content)),
            "connection": "close",
            **error.headers(),
        }
        head = f"HTTP/1.1 {error.status} Refused\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
        self.transport.write(head.encode() + content)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _write_now(weak: ref[RequestResponseCycle], body: bytes) -> bool:
    """See WRITE_NOW: what `cycle.send` does with a piece of a body that the connection can take."""
    cycle = weak()
    if cycle is None or cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True
