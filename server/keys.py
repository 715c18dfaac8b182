"""The keys that open the server: who each belongs to, what it may do, and how much of it.

Keys are kept as SHA-256 digests. A key of the keys file has a name, and that name is its tenant; one of `--api-key` has
none, and its tenant is the beginning of its digest, which opens nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

# What a key may do. `tenant`: send requests in the name of others, as a gateway does.
INFER, METRICS, ADMIN, TENANT = "infer", "metrics", "admin", "tenant"
SCOPES = frozenset({INFER, METRICS, ADMIN, TENANT})

# Of requests under `--scheduling-policy priority`. One level is worth ten seconds of waiting (scheduler/policy.py), so
# a class is a minute away from the next.
PRIORITY_CLASSES = {"interactive": -6, "standard": 0, "batch": 6}

TENANT_DIGITS = 12  # 48 bits tell the keys of one server apart
OTHER_TENANTS = "other"  # in metrics: all that have no name


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is known of a caller. The defaults are those of a caller without limits, who may do nothing.

    name            the tenant, "" where no keys are set
    digests         SHA-256 of the keys that open; several while one replaces another
    named           it comes from the keys file
    scopes          what it may do, of SCOPES
    weight          its share beside other tenants'; None = as the engine was started
    rpm, tpm        requests and tokens a minute; None = any number
    max_concurrent  requests that are open at once; None = any number
    priority        the most urgent priority that it may ask for, and has without asking; None = any, and 0
    expires         Unix seconds from which on it opens nothing
    """

    name: str = ""
    digests: tuple[bytes, ...] = ()
    named: bool = False
    scopes: frozenset[str] = frozenset()
    weight: float | None = None
    rpm: int | None = None
    tpm: int | None = None
    max_concurrent: int | None = None
    priority: int | None = None
    expires: float = math.inf


NOBODY = Key()
EVERYBODY = Key(scopes=SCOPES)  # where no keys are set


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def plain_key(key: str) -> Key:
    """A key of `--api-key`. What it may do beyond inference is for the keys file to say."""
    digest = digest_of(key)
    return Key(name=digest.hex()[:TENANT_DIGITS], digests=(digest,), scopes=frozenset({INFER}))


class KeyRing:
    """All keys that are accepted now: those of the start, and those of the keys file as it was last read."""

    def __init__(self, plain: Sequence[str], named: Sequence[Key] = (), clock: Callable[[], float] = time.time) -> None:
        """`clock`: Unix seconds, for keys that expire."""
        self._plain = [plain_key(key) for key in plain]
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self.replace(named)

    def replace(self, named: Sequence[Key]) -> None:
        """In place of the keys of the keys file."""
        self.named: Mapping[str, Key] = {key.name: key for key in named}
        self._entries = [(digest, key) for key in (*self._plain, *named) for digest in key.digests]

    @property
    def names(self) -> set[str]:
        """Of all keys: the tenants that have one."""
        return {key.name for _, key in self._entries}

    def find(self, offered: str) -> Key | None:
        """Whose key it is, expired ones included. The time does not tell which key it is, or how much of it fits."""
        if not offered:
            return None
        digest = digest_of(offered)
        found = None
        for known, key in self._entries:  # all of them: no early exit
            if hmac.compare_digest(digest, known):
                found = key
        return found

    def expired(self, key: Key) -> bool:
        return self._clock() >= key.expires

    def guards(self, scope: str) -> bool:
        """Whether a key is needed for it. `/metrics` is open until a key of the file is there to scrape it with."""
        if scope == METRICS:
            return any(METRICS in key.scopes for key in self.named.values())
        return bool(self._entries)

    def cache_salt(self, tenant: str, client_salt: str) -> str:
        """Prefix blocks are shared inside one tenant and one salt only, and nobody can compute another's salt."""
        if not tenant and not client_salt:
            return ""
        return hmac.new(self._secret, msgspec.json.encode((tenant, client_salt)), hashlib.sha256).hexdigest()
