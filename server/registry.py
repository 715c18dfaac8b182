"""Requests under way by the names that their callers know, for `/abort_requests`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .generate import Generation

Name = tuple[str, str]  # its owner: whose key it came with; and what its caller calls it

# What stands before that in the ids of answers.
PREFIXES = ("cmpl-", "chatcmpl-", "resp_", "msg_")


class Registry:
    """Names are labels: several requests may bear the same, and nobody reaches those of another's key."""

    def __init__(self) -> None:
        self._open: dict[str, dict[Generation, str]] = {}  # label -> its bearers, and their owners

    def enter(self, name: Name, generation: Generation) -> None:
        owner, label = name
        self._open.setdefault(label, {})[generation] = owner

    def leave(self, name: Name, generation: Generation) -> None:
        """Idempotent."""
        _, label = name
        bearers = self._open.get(label, {})
        bearers.pop(generation, None)
        if not bearers:
            self._open.pop(label, None)

    def abort(self, owner: str | None, labels: Iterable[str]) -> list[str]:
        """End `owner`'s requests of exactly these names, or of the answers' ids made of them; those that were found.

        owner: None = whosever they are
        """
        found = []
        for label in labels:
            bearers = next((some for name in _names(label) if (some := self._bearers(owner, name))), [])
            for generation in bearers:
                generation.abort()
            if bearers:
                found.append(label)
        return found

    def _bearers(self, owner: str | None, label: str) -> list[Generation]:
        return [one for one, whose in self._open.get(label, {}).items() if owner in (None, whose)]

    def __len__(self) -> int:
        return sum(len(bearers) for bearers in self._open.values())


def _names(label: str) -> list[str]:
    return [label, *(label.removeprefix(prefix) for prefix in PREFIXES if label.startswith(prefix))]
