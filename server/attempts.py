"""Wrong keys, counted by the address that they come from: whoever guesses is soon told to wait.

An address that has failed too often is refused whatever it sends, so that it does not learn when a guess is right; but
keys that opened from there before still do: one misconfigured client must not lock out its neighbours behind the same
router. This machine's own addresses are not counted: a proxy there speaks for everybody (uvicorn takes the caller's
address from its X-Forwarded-For, and from that of the proxies named in FORWARDED_ALLOW_IPS).
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from .bucket import Bucket

FREE = 20  # wrong keys in a row: a person who mistypes, a deployment of a few processes with yesterday's key
PER_MINUTE = 20  # after that: a million guesses take five weeks
ADDRESSES = 4096  # the least recent ones are forgotten
KEYS_PER_ADDRESS = 8  # of which it is remembered that they opened from there


@dataclass(slots=True)
class _Caller:
    allowance: Bucket
    opened: OrderedDict[str, None] = field(default_factory=OrderedDict)  # names of keys, the latest last


class Attempts:
    """A bounded table: address -> how many more wrong keys it may send, and which keys have opened from there.

    Keys are checked by both event loops, that of the probes being on a thread of its own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._callers: OrderedDict[str, _Caller] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, address: str, name: str | None) -> float:
        """Seconds until `address` is heard again, who now sends the key called `name` (None = a wrong one)."""
        with self._lock:
            caller = self._callers.get(_network(address))
            if caller is None or name in caller.opened:
                return 0.0
            return caller.allowance.seconds_until(1, self._clock())

    def failed(self, address: str) -> None:
        with self._lock:
            if (caller := self._caller(address)) is not None:
                caller.allowance.take(1, self._clock())

    def opened(self, address: str, name: str) -> None:
        with self._lock:
            if (caller := self._caller(address)) is not None:
                caller.opened[name] = None
                caller.opened.move_to_end(name)
                if len(caller.opened) > KEYS_PER_ADDRESS:
                    caller.opened.popitem(last=False)

    def _caller(self, address: str) -> _Caller | None:
        """Made when it is first heard of; None for an address that is not counted."""
        network = _network(address)
        if not network:
            return None
        caller = self._callers.get(network)
        if caller is None:
            caller = self._callers[network] = _Caller(Bucket(FREE, PER_MINUTE / 60, self._clock()))
            if len(self._callers) > ADDRESSES:
                self._callers.popitem(last=False)
        self._callers.move_to_end(network)
        return caller


def _network(address: str) -> str:
    """Whom an address stands for: of IPv6 the network, as a household has 2^64 addresses. "" = is not counted."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found
    if found.is_loopback:
        return ""
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))
    return str(found)
