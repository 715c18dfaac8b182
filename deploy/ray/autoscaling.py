"""How many replicas there should be: by the engines' own queues, not by how many requests are open.

An open request costs little while it runs in a batch and everything while it waits, so one is not like another. What an
engine says of itself is: how many run, how many wait, how many could run at once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

# Of the places, those that are meant to be taken: past it newcomers are about to wait, and a replica takes longer to
# start than a burst to come.
FULL = 0.8


class Load(NamedTuple):
    """One replica's engine: requests that run, that wait, and that could run at once."""

    running: float
    waiting: float
    places: float


def wanted(loads: Collection[Load], queued: float = 0.0) -> float:
    """Replicas, not rounded, at which all that is open would fill FULL of the places.

    loads   of the replicas that have told; at least one, with places
    queued  requests that have not reached a replica
    """
    places = sum(load.places for load in loads) / len(loads)
    return (sum(load.running + load.waiting for load in loads) + queued) / (FULL * places)


def queue_policy(context: Any) -> tuple[float, dict[str, Any]]:
    """`wanted`, as Serve asks (`ray.serve.config.AutoscalingContext`); Serve rounds it up, keeps it within bounds, and
    waits before it follows. As long as no replica has told anything, nothing changes.
    """
    told = context.aggregated_metrics or {}
    names = set.intersection(*(set(told.get(field, ())) for field in Load._fields))
    loads = [Load(*(told[field][name] for field in Load._fields)) for name in names]
    if not loads:
        return context.target_num_replicas, {}
    return wanted(loads, context.total_queued_requests or 0.0), {}
