"""Percentiles of the last while, from histograms that only ever count up: what was counted since is a difference."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


def quantile(bounds: Sequence[float], counts: Sequence[int], q: float) -> float | None:
    """As Prometheus' `histogram_quantile`: linear inside a bucket, and the last bound for what lies beyond it.

    counts[i] are those in (bounds[i - 1], bounds[i]]; the last has no upper bound. None when nothing was counted.
    """
    total = sum(counts)
    if not total:
        return None
    rank, below, low = q * total, 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return low + (bound - low) * (rank - below) / count
        below += count
        low = bound
    return low


class Window:
    """The counts of one histogram over the last `seconds`, looked at `step` seconds apart."""

    def __init__(self, seconds: float, step: float) -> None:
        self._seconds, self._step = seconds, step
        self._looks: deque[tuple[float, list[int]]] = deque()

    def since(self, now: float, counts: Sequence[int]) -> list[int]:
        """What was counted in the window that ends `now`, when the histogram shows `counts`. Nothing is known of the
        time before the first look.
        """
        looks = self._looks
        while looks and now - looks[0][0] > self._seconds:
            looks.popleft()
        if not looks or now - looks[-1][0] >= self._step:
            looks.append((now, list(counts)))
        return [count - before for count, before in zip(counts, looks[0][1], strict=True)]

    def clear(self) -> None:
        self._looks.clear()
