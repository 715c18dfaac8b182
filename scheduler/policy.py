"""Who runs first: each policy is where a request stands in the queue, and whom it may displace when the house is full.

    fcfs      first come, first served
    priority  lower numbers first; waiting long enough outweighs any priority, so nobody starves
    fair      first come, first served per tenant; between tenants, whoever has been served least (fairness.py)
    deadline  whose first token is due first (earliest deadline first)

Within fcfs, priority and fair a short prompt may overtake a long one: a request stands behind those that come within
`overtaking` times its own prefill time. That is shortest-first with ageing: the mean wait falls, and nobody is
overtaken for longer than its own size accounts for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .fairness import Service
from .request import Group, Request

# One priority level is worth this much waiting. All waiting requests age at the same rate, so the order between two
# never changes while they wait: it is a constant of the request, and a heap is enough.
AGEING_SECONDS = 10.0

# Without a promise of its own a request counts as due this late under `deadline`: behind whoever promised something
# sooner, and before those who promise later.
UNPROMISED_SECONDS = 30.0

# Preempted so often, nobody's place is taken any more: everybody moves on.
PATIENCE = 3


def fcfs_place(group: Group, work: float, overtaking: float) -> float:
    return group.arrival + overtaking * work


def priority_place(group: Group, work: float, overtaking: float) -> float:
    """A prompt's length never counts for more than a level."""
    return group.arrival + min(overtaking * work, AGEING_SECONDS) + group.priority * AGEING_SECONDS


def deadline_place(group: Group, work: float, overtaking: float) -> float:
    """The latest moment to begin the prompt."""
    due = group.due if math.isfinite(group.due) else group.arrival + UNPROMISED_SECONDS
    return due - work


def never(waiting: Request, running: Request, service: Service) -> bool:
    return False


def by_priority(waiting: Request, running: Request, service: Service) -> bool:
    return waiting.group.priority < running.group.priority


def by_service(waiting: Request, running: Request, service: Service) -> bool:
    """A tenant that was served less displaces one that was served more and holds more than its share."""
    mine, theirs = waiting.group.tenant, running.group.tenant
    return service.seconds(mine) < service.seconds(theirs) and service.exceeds_share(theirs)


def by_deadline(waiting: Request, running: Request, service: Service) -> bool:
    """Who was promised something displaces who was not, if it is the more urgent."""
    promised = math.isfinite(waiting.group.due) and not math.isfinite(running.group.due)
    return promised and waiting.order < running.order


@dataclass(frozen=True, slots=True)
class Policy:
    """place(group, predicted seconds of its prompt, overtaking): lower is earlier, in seconds.

    displaces(waiting, running, service): whether the first may take the second's place when the house is full.
    """

    place: Callable[[Group, float, float], float]
    displaces: Callable[[Request, Request, Service], bool]
    by_tenant: bool = False
    refuses_late: bool = False  # work that cannot meet its deadline is not begun


POLICIES = {
    "fcfs": Policy(fcfs_place, never),
    "priority": Policy(priority_place, by_priority),
    "fair": Policy(fcfs_place, by_service, by_tenant=True),
    "deadline": Policy(deadline_place, by_deadline, refuses_late=True),
}
