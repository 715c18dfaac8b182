"""Instruments of the event loop show what prometheus-client's own would have shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest

from quire.server.tally import TallyCounter, TallyHistogram

BUCKETS = (0.001, 0.5, 1.0, 2.5, 40.0)

disable_created_metrics()


def exposed(*collectors):
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry).decode()


@given(st.lists(st.sampled_from([0.0, 0.001, 0.0011, 0.5, 1.0, 3.0, 40.0, 41.0]), max_size=30))
def test_a_histogram_is_the_librarys(values):
    own = TallyHistogram("a_seconds", "What.", "model_name", "m", BUCKETS)
    theirs = Histogram("a_seconds", "What.", ("model_name",), buckets=BUCKETS, registry=None)
    for value in values:
        own.observe(value)
        theirs.labels("m").observe(value)
    theirs.labels("m")
    assert exposed(own) == exposed(theirs)


@given(st.lists(st.integers(0, 9)))
def test_a_counter_is_the_librarys(values):
    own = TallyCounter("a", "What.", "model_name", "m")
    theirs = Counter("a", "What.", ("model_name",), registry=None)
    for value in values:
        own.inc(value)
        theirs.labels("m").inc(value)
    theirs.labels("m")
    assert exposed(own) == exposed(theirs)
