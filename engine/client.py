"""How the API side talks to an engine: one interface, in this process or in a child.

    send(AddRequest | Abort) ──▶ engine          engine ──▶ on_message(StepOutputs | EngineDead)

No asyncio here: `on_message` is called on a thread of the client's own; an async caller hops to its loop there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .messages import Abort, AddRequest, EngineDead, EngineReady, StepOutputs

OnMessage = Callable[[StepOutputs | EngineDead], None]


class EngineClient(Protocol):
    def start(self, on_message: OnMessage) -> EngineReady:
        """Start the engine and block until it serves. Raises EngineStartError with the reason (bad folder, memory…)."""
        ...

    def send(self, message: AddRequest | Abort) -> None:
        """Hand a message over and return at once; thread-safe. Raises EngineDeadError once the engine is gone."""
        ...

    def heartbeat_age(self) -> float:
        """Seconds since the engine's loop last showed that it turns; infinite when the engine is dead."""
        ...

    def close(self) -> None:
        """Stop the engine at once and release everything; idempotent."""
        ...
