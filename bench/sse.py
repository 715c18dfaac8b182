"""Server-sent events, read as they come: bytes in any pieces, whole events out."""

from __future__ import annotations


class EventReader:
    """Collects the `data` of events; comments and other fields are skipped (WHATWG HTML, section 9.2.6)."""

    def __init__(self) -> None:
        self._partial = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that this piece completes, in order. Lines end in LF or CRLF; a pair may fall between pieces."""
        *lines, self._partial = (self._partial + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
