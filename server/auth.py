"""Who may call what: an explicit table of all routes, and keys that are compared in constant time.

A route that is not in the table cannot be registered (`routing.py`), so nothing is open by accident.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from . import errors

TENANT_DIGITS = 12  # 48 bits tell the keys of one server apart


@dataclass(frozen=True, slots=True)
class Policy:
    needs_key: bool
    has_body: bool = False  # a JSON object, within max_body_bytes
    probe: bool = False  # polled by machines: no access line


POLICIES = {
    "/v1/completions": Policy(needs_key=True, has_body=True),
    "/v1/chat/completions": Policy(needs_key=True, has_body=True),
    "/v1/models": Policy(needs_key=True),
    "/v1/models/{model:path}": Policy(needs_key=True),
    "/tokenize": Policy(needs_key=True, has_body=True),
    "/detokenize": Policy(needs_key=True, has_body=True),
    "/openapi.json": Policy(needs_key=True),
    "/health": Policy(needs_key=False, probe=True),
    "/ready": Policy(needs_key=False, probe=True),
    "/live": Policy(needs_key=False, probe=True),
    "/metrics": Policy(needs_key=False, probe=True),
    "/version": Policy(needs_key=False),
}


class Keys:
    """The accepted keys, kept as digests only."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [_digest(key) for key in keys]
        self._secret = secrets.token_bytes(32)

    def check(self, authorization: str | None) -> bytes:
        """The digest of the caller's key, b"" where no keys are set. Raises 401."""
        if not self._digests:
            return b""
        scheme, _, key = (authorization or "").partition(" ")
        offered = _digest(key.strip())
        matches = [hmac.compare_digest(offered, digest) for digest in self._digests]  # all of them: no early exit
        if scheme.lower() != "bearer" or not any(matches):
            raise errors.unauthorized()
        return offered

    def cache_salt(self, tenant: bytes, client_salt: str) -> str:
        """Prefix blocks are shared inside one key and one salt only, and nobody can compute another's salt."""
        if not tenant and not client_salt:
            return ""
        return hmac.new(self._secret, tenant + b"\0" + client_salt.encode(), hashlib.sha256).hexdigest()


def tenant_of(key_digest: bytes) -> str:
    """The name under which a key's requests are counted: the beginning of its SHA-256, which opens nothing."""
    return key_digest.hex()[:TENANT_DIGITS]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
