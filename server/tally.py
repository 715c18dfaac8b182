"""Instruments for what happens at every token: plain numbers, which become Prometheus families when somebody scrapes.

prometheus-client's own lock each value and walk through the buckets: a microsecond of every token. Who counts here is
the event loop alone; who scrapes, on whatever thread, reads numbers that are a token old at most.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TallyCounter(Collector):
    """A counter with one label."""

    def __init__(self, name: str, text: str, label: str, value: str) -> None:
        self._name, self._text, self._label, self._value = name, text, label, value
        self._count = 0

    def inc(self, amount: int) -> None:
        self._count += amount

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=(self._label,))
        family.add_metric((self._value,), self._count)
        yield family


class TallyHistogram(Collector):
    """A histogram with one label. `buckets`: upper bounds, ascending; what equals a bound is in its bucket."""

    def __init__(self, name: str, text: str, label: str, value: str, buckets: tuple[float, ...]) -> None:
        self._name, self._text, self._label, self._value = name, text, label, value
        self.bounds = buckets
        self.counts = [0] * (len(buckets) + 1)  # by bucket, not accumulated; the last has no upper bound
        self._sum = 0.0

    def observe(self, amount: float) -> None:
        self.counts[bisect_left(self.bounds, amount)] += 1
        self._sum += amount

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, self.bounds), "+Inf"]
        totals = accumulate(self.counts)
        family = HistogramMetricFamily(self._name, self._text, labels=(self._label,))
        family.add_metric((self._value,), list(zip(bounds, totals, strict=True)), self._sum)
        yield family
