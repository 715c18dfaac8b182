"""Who is here: requests from their arrival to their end, waiting or running.

    add() ─▶ Group ──offer──▶ its next sample waits ──▶ (the scheduler lets it in, or back out) ──▶ finish()

A group's samples come into being one by one, so what is held for a request does not grow with n.
"""

from __future__ import annotations

from .config import SchedulerConfig
from .drafts import DraftOrder
from .fairness import Service
from .hashing import root_key
from .limits import TimeLimits
from .params import SamplingParams, Slo
from .policy import Policy
from .queue import WaitingQueue
from .request import Group, Request
from .residency import Residency
from .step_time import StepTimeModel, ideal_seconds


class Refused(ValueError):
    """A request that could never run; the message says why."""


class Roster:
    def __init__(self, config: SchedulerConfig, policy: Policy, steps: StepTimeModel) -> None:
        self.residency = Residency(config)
        self.waiting = WaitingQueue()
        self.service = Service(config.tenant_weights, config.max_num_seqs)
        self.groups: dict[str, Group] = {}
        self.limits = TimeLimits(self.groups)
        self.num_unborn = 0  # samples that have not begun to wait
        self._config = config
        self._policy = policy
        self._steps = steps
        self._serial = 0

    def add(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int,
        arrival: float,
        cache_salt: str,
        tenant: str,
        weight: float | None,
        slo: Slo,
        timeout: float | None,
        draft: DraftOrder | None,
    ) -> None:
        """As `Scheduler.add`."""
        if request_id in self.groups:
            raise Refused(f"request id {request_id!r} is in use")
        if not prompt_ids:
            raise Refused("the prompt is empty: at least one token is needed")
        if len(prompt_ids) + (params.max_tokens > 0) > self._config.max_model_len:
            raise Refused(f"the prompt has {len(prompt_ids)} tokens, the context {self._config.max_model_len}")
        group = Group(
            request_id,
            list(prompt_ids),
            params,
            self._next_serial(),
            min(len(prompt_ids) + params.max_tokens, self._config.max_model_len),
            arrival,
            priority,
            tenant,
            slo,
            root=root_key(cache_salt, *self._config.cache_context),
            salt=cache_salt,
            draft=draft,
        )
        self.groups[request_id] = group
        self.num_unborn += params.n
        self.service.arrives(tenant, weight)
        self._promise_by_time(group, timeout)
        self.offer(group, arrival)

    def lane(self, request: Request) -> str:
        """The name of the queue's lane in which it waits."""
        return request.group.tenant if self._policy.by_tenant else ""

    def wait(self, request: Request) -> None:
        """Into the queue, at the place that it was given."""
        self.waiting.push(request, self.lane(request))

    def offer(self, group: Group, since: float) -> None:
        """Put the next sample into the queue, as if it had come at `since`."""
        request = self.next_sample(group, since)
        if request is not None:
            self.wait(request)

    def next_sample(self, group: Group, since: float) -> Request | None:
        """The next sample, with its place in the queue: as if it had come at `since`."""
        work = 0.0 if group.prefix else self._prompt_work(group)
        place = self._policy.place(group, work, self._config.overtaking) + since - group.arrival
        request = group.begin((place, self._next_serial()))
        if request is not None:
            request.work = work
            self.num_unborn -= 1
        return request

    def end(self, group: Group, index: int | None) -> list[int]:
        """End the sample of that index, or all; the indices of those that had not ended before."""
        if index is None:
            indices = [sample.index for sample in group.live]
            unborn = [i for i in range(group.next_index, group.params.n) if i not in group.cancelled]
            indices += unborn
            self.num_unborn -= len(unborn)
            group.next_index = group.params.n
            group.cancelled.clear()
        elif any(sample.index == index for sample in group.live):
            indices = [index]
        elif group.next_index <= index < group.params.n and index not in group.cancelled:
            group.cancelled.add(index)
            self.num_unborn -= 1
            return [index]
        else:
            return []
        for sample in [sample for sample in group.live if sample.index in indices]:
            self.finish(sample)
        return indices

    def leave(self, request: Request) -> None:
        """Out of the batch; it has to wait again, or to finish."""
        self.residency.leave(request)
        self.service.stops(request.group.tenant)

    def finish(self, request: Request) -> None:
        """A sample ends, wherever it is; its group ends with its last one."""
        request.finished = True
        if request.slot >= 0:
            self.leave(request)
        else:
            self.waiting.discard(request)
        group = request.group
        group.live.remove(request)
        if not group.live:
            self.offer(group, group.arrival)  # unless all have begun
        if not group.live:
            self.residency.unpin(group)
            self.service.leaves(group.tenant)
            del self.groups[group.request_id]

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _prompt_work(self, group: Group) -> float:
        probe = Request(group, group.next_index, group.prompt, (0.0, 0), group.params, len(group.prompt))
        cached = len(self.residency.prefix.match(probe)) * self._config.block_size
        return self._steps.cost.work_seconds(cached, len(group.prompt) - cached)

    def _promise_by_time(self, group: Group, timeout: float | None) -> None:
        """When the group's limits are over, and by when its first token is due."""
        slo, params, cost = group.slo, group.params, self._steps.cost
        if timeout is not None:
            self.limits.add(group, group.arrival + timeout, "timeout")
        if slo.ttft is not None:
            group.due = group.arrival + slo.ttft
        if slo.deadline is not None:
            end = group.arrival + slo.deadline
            self.limits.add(group, end, "deadline")
            # What is sure to be drawn: a sample may end itself after its min_tokens, by a grammar at once.
            least = params.max_tokens if params.ignore_eos and not params.stop_token_ids else max(1, params.min_tokens)
            if params.grammar is not None:
                least = 1
            decodes = ideal_seconds(cost, 0, least, self._config.max_num_batched_tokens)
            group.due = min(group.due, end - decodes)
            if self._policy.refuses_late:
                self.limits.add(group, end - decodes - cost.base - self._prompt_work(group), "unreachable")

    def check(self) -> None:
        """Raise RuntimeError unless every block, slot and request is accounted for."""
        self.residency.check()
        alive = sum(len(group.live) for group in self.groups.values())
        running = len(self.residency.running)
        if alive != len(self.waiting) + running:
            raise RuntimeError(f"{alive} samples alive, {len(self.waiting)} wait and {running} run")
        unborn = sum(group.num_unborn for group in self.groups.values())
        if unborn != self.num_unborn:
            raise RuntimeError(f"{unborn} samples are yet to begin, {self.num_unborn} counted")
