"""When requests leave the client."""

from __future__ import annotations

import random


def arrival_times(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds from the start at which `count` requests are due, at `rate` requests a second on average.

    Gaps are gamma distributed with shape `burstiness` and mean 1 / rate: 1 is the Poisson process, below 1 comes in
    bursts, above 1 evens out (coefficient of variation 1 / sqrt(burstiness)). The first request is due at once.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"request rate {rate} and burstiness {burstiness} must be above 0")
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += draw.gammavariate(burstiness, 1 / (rate * burstiness))
    return times
