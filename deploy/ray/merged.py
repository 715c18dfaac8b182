"""What all replicas have to be asked for, as one answer: their metrics, and requests to end by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ...server import errors
from .call import Call, Everyone

METRICS, ABORT = "/metrics", "/abort_requests"
PATHS = frozenset({METRICS, ABORT})

TEXT = "text/plain; version=0.0.4; charset=utf-8"


async def answer_of_all(call: Call, everyone: Everyone) -> tuple[int, str, bytes]:
    """Status, content type and body. Where a replica refuses, its refusal: all have the same keys and rules."""
    answers = await everyone(call)
    refused = next(((status, errors.JSON, body) for _, status, body in answers if status != 200), None)
    if refused is not None:
        return refused
    bodies = {replica: body for replica, _, body in answers}
    return (200, TEXT, metrics(bodies)) if call.path == METRICS else (200, errors.JSON, aborted(list(bodies.values())))


def metrics(pages: Mapping[str, bytes]) -> bytes:
    """One page of those of all replicas, each series under the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def aborted(bodies: Sequence[bytes]) -> bytes:
    """Of `/abort_requests`: the names that were found anywhere."""
    found = dict.fromkeys(name for body in bodies for name in msgspec.json.decode(body)["aborted"])
    return msgspec.json.encode({"aborted": list(found)})
