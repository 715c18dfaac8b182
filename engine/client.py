"""How the API side talks to an engine: one interface, in this process or in a child.

    send(AddRequest | Abort | Watch) ──▶ engine  engine ──▶ on_message(Progress … StepOutputs … EngineDead)

No asyncio here: `on_message` is called on a thread of the client's own; an async caller hops to its loop there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

from .messages import Abort, AddRequest, EngineDead, EngineHung, EngineReady, Progress, StepOutputs, Watch

# What is heard of an engine: of one that is alone Progress, StepOutputs and EngineDead; of one that is watched and
# started again (supervisor.py) also EngineHung, and EngineReady whenever another has taken its place.
News = Progress | EngineReady | StepOutputs | EngineHung | EngineDead
OnMessage = Callable[[News], None]

# A step that was announced to be long may take so many times what was predicted: the step-time model is fitted to
# small steps first, and a machine that others use as well may halve its speed at any time.
PATIENCE = 4.0


class EngineClient(Protocol):
    def start(self, on_message: OnMessage) -> EngineReady:
        """Start the engine and block until it serves. Raises EngineStartError with the reason (bad folder, memory…)."""
        ...

    def send(self, message: AddRequest | Abort | Watch) -> None:
        """Hand a message over and return at once; thread-safe. Raises EngineDeadError once the engine is gone."""
        ...

    def heartbeat_age(self) -> float:
        """Seconds since the engine's loop last showed that it turns, less what it announced that it would be silent;
        infinite when the engine is dead."""
        ...

    def kill(self) -> None:
        """End the engine now, however stuck it is, even while another thread is in `start`: that raises, and an engine
        that served is reported dead. What a thread cannot be forced to do, it is told to do."""
        ...

    def close(self) -> None:
        """Stop the engine at once and release everything; idempotent."""
        ...


class Heartbeat:
    """When the engine last gave a sign of life, or may be expected to give one."""

    def __init__(self) -> None:
        self._expected = -math.inf

    def beat(self, busy_seconds: float = 0.0) -> None:
        """A sign of life; the next one may be `busy_seconds` away, as predicted."""
        self._expected = time.monotonic() + PATIENCE * busy_seconds

    def age(self) -> float:
        return max(0.0, time.monotonic() - self._expected)
