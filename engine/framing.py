"""Messages over a stream socket, each behind its length."""

from __future__ import annotations

import socket
import time

LENGTH_BYTES = 8
PART_BYTES = 1 << 20  # read at once: no memory is taken for what was announced and does not come


def frame(message: bytes) -> bytes:
    """What to send."""
    return len(message).to_bytes(LENGTH_BYTES, "big") + message


def receive(channel: socket.socket, limit: int | None = None, deadline: float | None = None) -> bytes:
    """The next message.

    limit: its bytes at most; None = any. deadline: on the clock of `time.monotonic`; None = the socket's own timeout.
    Raises EOFError where the other side has closed or announces more than `limit`, TimeoutError past `deadline`, and
    what else the socket raises.
    """
    size = int.from_bytes(_exactly(channel, LENGTH_BYTES, deadline), "big")
    if limit is not None and size > limit:
        raise EOFError(f"a message of {size} bytes, where {limit} are the most")
    return _exactly(channel, size, deadline)


def _exactly(channel: socket.socket, count: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < count:
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 0.001))
        part = channel.recv(min(count - len(data), PART_BYTES))
        if not part:
            raise EOFError("the other side has closed")
        data += part
    return bytes(data)
