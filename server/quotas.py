"""What the keys file grants each key: requests and tokens a minute, and requests that are open at once.

    count()  one request, when its key has been checked
    lease()  its tokens and its place, before anything is tokenized ──▶ Lease ──▶ settle(), when it has ended

Tokens are charged as what the request may come to, and corrected by what it came to: what it did not draw is given
back, what it drew beyond is owed and paid by those that follow. Both limits fill up continuously, so a minute has no
edge to wait for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from . import errors
from .bucket import Bucket
from .keys import Key


@dataclass(slots=True)
class _Account:
    requests: Bucket | None = None
    tokens: Bucket | None = None
    open: int = 0  # leases


class Lease:
    """A request that is open: its place, and the tokens it was charged for."""

    def __init__(self, quotas: Quotas, account: _Account, tokens: int) -> None:
        self._quotas = quotas
        self._account = account
        self._tokens = tokens
        self._settled = False

    def settle(self, tokens: int) -> bool:
        """It has ended after so many tokens. True the first time; later calls change nothing."""
        if self._settled:
            return False
        self._settled = True
        self._quotas.give_back(self._account, self._tokens - tokens)
        return True


class Quotas:
    """The accounts of all keys by name. Used on the first event loop only, never by a probe. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def count(self, key: Key) -> None:
        """One request. Raises 429 where the key's minute has no room for it."""
        bucket = self._account(key).requests
        if bucket is not None:
            wait = bucket.seconds_until(1, self._clock())
            if wait > 0:
                raise errors.rate_limited(f"{key.rpm} requests a minute", wait)
            bucket.take(1, self._clock())

    def lease(self, key: Key, tokens: int) -> Lease:
        """A place, and `tokens` as charged in advance. Raises 429 where there is no room for one of them."""
        account, now = self._account(key), self._clock()
        if key.max_concurrent is not None and account.open >= key.max_concurrent:
            raise errors.rate_limited(f"{key.max_concurrent} requests at once", 0.0)
        bucket = account.tokens
        if bucket is not None:
            if tokens > bucket.capacity:
                raise errors.larger_than_quota(tokens, key.tpm or 0)
            wait = bucket.seconds_until(tokens, now)
            if wait > 0:
                raise errors.rate_limited(f"{key.tpm} tokens a minute, and this request counts for {tokens}", wait)
            bucket.take(tokens, now)
        account.open += 1
        return Lease(self, account, tokens)

    def give_back(self, account: _Account, tokens: int) -> None:
        """A lease has ended; `tokens` fewer were used than charged, or more where that is negative."""
        account.open -= 1
        if account.tokens is not None:
            account.tokens.take(-tokens, self._clock())

    def keep(self, names: Collection[str]) -> None:
        """Forget the accounts of all other keys, except while they have open requests."""
        self._accounts = {name: a for name, a in self._accounts.items() if name in names or a.open}

    def headers(self, key: Key) -> dict[str, str]:
        """What is left of the key's minute, as OpenAI's clients know it; nothing of what has no limit."""
        account, now = self._account(key), self._clock()
        headers = {}
        for what, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{what}"] = str(int(bucket.capacity))
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level(now))))
                headers[f"x-ratelimit-reset-{what}"] = _duration(bucket.seconds_until(bucket.capacity, now))
        return headers

    def _account(self, key: Key) -> _Account:
        """With the limits that the key has now: the file may have been read again."""
        account = self._accounts.get(key.name)
        if account is None:
            account = self._accounts[key.name] = _Account()
        now = self._clock()
        account.requests = _sized(account.requests, key.rpm, now)
        account.tokens = _sized(account.tokens, key.tpm, now)
        return account


def _sized(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, per_minute / 60, now)
    if bucket.capacity != per_minute:
        bucket.resize(per_minute, per_minute / 60, now)
    return bucket


def _duration(seconds: float) -> str:
    """As in OpenAI's headers: "250ms", "1s", "1m30s"."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
