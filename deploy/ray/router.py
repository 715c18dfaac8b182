"""`routing.Fleet` as a request router of Ray Serve: one in each process that sends requests to replicas."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .prefix import Chain
from .routing import OPEN_CHUNKS, Fleet


class PrefixRouter(RequestRouter):
    """Sends a request to the replica whose cache holds most of its prompt, unless that one is overloaded. The first
    argument of what it routes is a `Call`.

    What is open where is what this process has sent, or what the replica told with its last answer, whichever is more:
    others may send as well.
    """

    def initialize_state(self, open_chunks: float = OPEN_CHUNKS) -> None:
        """`open_chunks`: as in `Fleet`."""
        self._fleet = Fleet(open_chunks)
        self._open: Counter[str] = Counter()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._keep_known()
        for replica in replicas:
            if replica.routing_stats:
                self._fleet.told(replica.replica_id.unique_id, **replica.routing_stats)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._keep_known()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank, best first: the next one is asked if the first has no room."""
        chain, avoid = _asked(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        there = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        told = self.replica_queue_len_cache
        open = {name: max(self._open[name], told.get(replica.replica_id) or 0) for name, replica in there.items()}
        names = self._fleet.rank(chain, open, avoid) or self._fleet.rank(chain, open)
        return [[there[name]] for name in names if name in there]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._open[replica_id.unique_id] += 1
        self._fleet.sent(replica_id.unique_id, _asked(pending_request)[0])

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._open[replica_id.unique_id] = max(self._open[replica_id.unique_id] - 1, 0)

    def _keep_known(self) -> None:
        names = {replica_id.unique_id for replica_id in self.curr_replicas}
        self._fleet.keep(names)
        self._open = Counter({name: count for name, count in self._open.items() if name in names})


class RandomRouter(PrefixRouter):
    """Any replica: what prefix-aware routing is measured against."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return [[replica] for replica in random.sample(candidate_replicas, len(candidate_replicas))]


def _asked(pending_request: PendingRequest | None) -> tuple[Chain, tuple[str, ...]]:
    """The chain and whom to avoid; neither for what is no `Call`, such as a question to one replica about itself."""
    call = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return getattr(call, "chain", ()), getattr(call, "avoid", ())
