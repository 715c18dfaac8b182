"""Requests under way by the names that their callers know, for `/abort_requests`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .generate import Generation

Name = tuple[str, str]  # whose key it came with, and what its caller calls it

# What stands before that in the ids of answers.
PREFIXES = ("cmpl-", "chatcmpl-", "resp_", "msg_")


class Registry:
    """Names are labels: several requests may bear the same, and nobody reaches those of another's key."""

    def __init__(self) -> None:
        self._open: dict[Name, set[Generation]] = {}

    def enter(self, name: Name, generation: Generation) -> None:
        self._open.setdefault(name, set()).add(generation)

    def leave(self, name: Name, generation: Generation) -> None:
        """Idempotent."""
        bearers = self._open.get(name, set())
        bearers.discard(generation)
        if not bearers:
            self._open.pop(name, None)

    def abort(self, owner: str, labels: Iterable[str]) -> list[str]:
        """End `owner`'s requests of exactly these names, or of the answers' ids made of them; those that were found."""
        found = []
        for label in labels:
            bearers = next((some for name in _names(label) if (some := self._open.get((owner, name)))), ())
            for generation in tuple(bearers):
                generation.abort()
            if bearers:
                found.append(label)
        return found

    def __len__(self) -> int:
        return sum(len(bearers) for bearers in self._open.values())


def _names(label: str) -> list[str]:
    return [label, *(label.removeprefix(prefix) for prefix in PREFIXES if label.startswith(prefix))]
