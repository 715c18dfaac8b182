"""How late the event loop is: the time by which it misses what it was to do now, as everybody on it feels it."""

from __future__ import annotations

import asyncio
import time

from .metrics import Metrics

INTERVAL = 0.05  # seconds: what blocks the loop for longer than that is always seen, and looking costs nothing


async def watch_lag(metrics: Metrics, interval: float = INTERVAL) -> None:
    """Runs until cancelled."""
    while True:
        due = time.monotonic() + interval
        await asyncio.sleep(interval)
        metrics.loop_lag.observe(max(0.0, time.monotonic() - due))
