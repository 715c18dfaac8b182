"""Who may call what: an explicit table of all routes, and the door at which keys are checked.

A route that is not in the table cannot be registered (`routing.py`), so nothing is open by accident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import errors
from .attempts import Attempts
from .keys import ADMIN, EVERYBODY, INFER, METRICS, NOBODY, Key, KeyRing
from .quotas import Quotas


@dataclass(frozen=True, slots=True)
class Policy:
    """What a route asks for.

    scope     that the caller's key must have, where keys are set; None = open to everybody
    has_body  a JSON object, within max_body_bytes
    counted   it counts as a request of its key's minute
    probe     polled by machines: no access line
    """

    scope: str | None = INFER
    has_body: bool = False
    counted: bool = True
    probe: bool = False


POLICIES = {
    "/v1/completions": Policy(has_body=True),
    "/v1/chat/completions": Policy(has_body=True),
    "/v1/decisions": Policy(has_body=True),
    "/v1/completions/render": Policy(has_body=True),
    "/v1/chat/completions/render": Policy(has_body=True),
    "/v1/responses": Policy(has_body=True),
    "/v1/messages": Policy(has_body=True),
    "/v1/messages/count_tokens": Policy(has_body=True),
    "/v1/models": Policy(counted=False),
    "/v1/models/{model:path}": Policy(counted=False),
    "/tokenize": Policy(has_body=True),
    "/detokenize": Policy(has_body=True),
    "/tokenizer_info": Policy(counted=False),
    "/abort_requests": Policy(has_body=True, counted=False),
    "/load": Policy(counted=False, probe=True),
    "/server_info": Policy(scope=ADMIN, counted=False),
    "/openapi.json": Policy(counted=False),
    "/health": Policy(scope=None, counted=False, probe=True),
    "/ready": Policy(scope=None, counted=False, probe=True),
    "/live": Policy(scope=None, counted=False, probe=True),
    "/metrics": Policy(scope=METRICS, counted=False, probe=True),
    "/version": Policy(scope=None, counted=False),
    "/": Policy(scope=None, counted=False),
    "/page/{file}": Policy(scope=None, counted=False),
    "/steps": Policy(scope=METRICS, counted=False),
}


class Door:
    """Lets callers in by their key, and counts the wrong ones by address. It is there before the engine is."""

    def __init__(self, ring: KeyRing) -> None:
        self.ring = ring
        self.quotas = Quotas()
        self._attempts = Attempts()

    def use_keys(self, named: Sequence[Key]) -> None:
        """The keys file has been read: its keys in place of those that it held before."""
        self.ring.replace(named)
        self.quotas.keep(self.ring.names)

    def check(self, policy: Policy, headers: Mapping[str, str], address: str) -> Key:
        """The caller, as its key says. Raises 401, 403, or 429 after too many wrong keys from `address`."""
        if policy.scope is None or not self.ring.guards(policy.scope):
            return NOBODY if self.ring.guards(INFER) else EVERYBODY
        key = self.ring.find(_offered(headers))
        wait = self._attempts.wait(address, None if key is None else key.name)
        if wait > 0:
            raise errors.too_many_attempts(wait)
        if key is None:
            self._attempts.failed(address)
            raise errors.unauthorized()
        self._attempts.opened(address, key.name)
        if self.ring.expired(key):
            raise errors.expired_key()
        if policy.scope not in key.scopes:
            raise errors.missing_scope(policy.scope)
        return key

    def count(self, policy: Policy, caller: Key) -> None:
        """One request. Raises 429 where the caller's minute has no room for it."""
        if policy.counted:
            self.quotas.count(caller)


def _offered(headers: Mapping[str, str]) -> str:
    """The key as OpenAI's clients send it, or as Anthropic's do."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("x-api-key", "").strip()
