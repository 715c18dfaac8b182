"""Which tokens run in the next step.

    add() / abort() ──▶ waiting ──▶ running ──schedule()──▶ StepPlan ──runner──▶ StepResult ──update()──▶ Chunks

A step is filled in this order:
    1. every running request that only lacks its next token: streams never wait for a prompt (Sarathi-Serve,
       arXiv 2403.02310, algorithm 3);
    2. within the budget that they leave (budget.py), prompts in progress and waiting requests in the policy's order
       (policy.py), packed (packing.py); one that enters is given blocks for all its known tokens, above a watermark.
       A further sample of a computed prompt needs a slot, a block or two, and one token of the budget;
    3. more such samples, while slots are free;
    4. guesses behind the tokens of streams (drafting.py), in what tokens, blocks and promised gaps then remain.
Out of blocks, the running request that has computed least is preempted and recomputed later, never the first in order.

A step may be planned while one is out (`may_plan_ahead`): tokens that are drawn but not known have their place already.
Whoever turns out to have ended by such a token has a row too many, whose result is dropped. Nobody is preempted while a
step is out, and what a finished request held is handed on in a later plan than its last row. How far a stream is after
a step with guesses is known when they are verified, so nothing is planned while one is out.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from operator import attrgetter
from typing import NamedTuple

from .block_pool import BlockPool
from .budget import UNPROMISED, Budget, equal_time_seconds
from .config import Counters, SchedulerConfig
from .drafting import Drafting, as_run, step_shape
from .forecast import wait_seconds
from .packing import Want, pack
from .params import SamplingParams, Slo, Speculative
from .plan import Chunk, Draw, Row, RowResult, StepPlan, StepResult
from .policy import PATIENCE, POLICIES, never
from .request import Group, Request
from .roster import Roster
from .speculation import most_for
from .step_time import StepCost, StepShape, StepTimeModel, shape_of

# Requests looked at beyond those that fill the budget, for one that fits better into what is left.
WINDOW = 16

# Waiting requests passed by at most, because they had better wait for a prefix that another is computing.
PASSED_BY = 64

# Weight of the latest sample in the running mean of output lengths: the last 20 or so count.
OUTPUT_MEMORY = 0.05


log = logging.getLogger(__name__)

_order = attrgetter("order")


def _want(request: Request) -> Want:
    """The tokens that it lacks, those of a waiting one as it was last looked at; of a fork the one it will draw."""
    if request.slot < 0 and request.forks:
        return Want(request.num_prompt, int(request.params.max_tokens > 1))
    start = request.num_computed if request.slot >= 0 else request.findable
    return Want(start, request.num_tokens - start, request.passed_over)


class _Out(NamedTuple):
    """A plan whose result is not known yet."""

    plan: StepPlan
    shape: StepShape
    in_step: list[Request]  # beside plan.rows
    drawing: list[Request]  # beside plan.draws


class Scheduler:
    def __init__(self, config: SchedulerConfig, cost: StepCost) -> None:
        """cost: what a step is believed to take at first; it is refined by the steps that `update` is told of."""
        self.config = config
        self.policy = POLICIES[config.policy]
        self.steps = StepTimeModel(cost)
        depth = config.draft_shape.depth if config.draft_shape is not None else 0
        self.counters = Counters(drafted_at=[0] * depth, accepted_at=[0] * depth, depths=[0] * (depth + 1))
        self.roster = Roster(config, self.policy, self.steps)
        self.residency, self.waiting, self.service = self.roster.residency, self.roster.waiting, self.roster.service
        self.drafting = Drafting(config, self.steps, self.residency, self.counters)
        self.shape = StepShape()  # of the latest plan
        self._entered: set[Request] = set()  # in the plan that is being made
        self._rows: dict[Request, Row] = {}  # of the plan that is being made
        self._drawing: list[Request] = []  # beside its draws
        self._out: deque[_Out] = deque()
        self._held_up = False  # somebody was not let in because a step was out
        self._taken: list[Request] = []  # out of the queue while a plan is made
        self._mean_output = 0.0  # tokens of a finished sample
        self._step_id = 0
        self._at: Request | None = None  # the request that is being planned for

    # ---------------------------------------------------------------- requests in and out

    def add(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival: float = 0.0,
        cache_salt: str = "",
        tenant: str = "",
        weight: float | None = None,
        slo: Slo | None = None,
        timeout: float | None = None,
        speculative: Speculative | None = None,
    ) -> None:
        """Queue params.n samples of a prompt. Raises Refused for what could never run; nothing is queued then.

        weight: the tenant's share from now on; None = as configured.
        timeout: seconds from arrival after which it ends, whatever it was doing.
        """
        self.roster.add(
            request_id,
            prompt_ids,
            params,
            priority=priority,
            arrival=arrival,
            cache_salt=cache_salt,
            tenant=tenant,
            weight=weight,
            slo=slo or Slo(),
            timeout=timeout,
            draft=most_for(self.config, speculative or Speculative()),
        )

    def abort(self, request_id: str, index: int | None = None) -> list[Chunk]:
        """End one sample of a request, or all, now; blocks return at once. What is unknown has ended already."""
        group = self.roster.groups.get(request_id)
        if group is None:
            return []
        ended = self.roster.end(group, index)
        self.counters.aborted += len(ended)
        return [Chunk(request_id, i, [], finish_reason="abort") for i in ended]

    def expire(self, now: float) -> list[Chunk]:
        """End what has run out of time, and what cannot be in time any more. Call before each step."""
        chunks = []
        for group, what in self.roster.limits.over(now):
            if what == "unreachable" and group.has_begun:
                continue
            ended = self.roster.end(group, None)
            self.counters.expired += len(ended)
            chunks += [Chunk(group.request_id, i, [], finish_reason="expired", error=what) for i in ended]
        return chunks

    @property
    def pool(self) -> BlockPool:
        return self.residency.pool

    @property
    def running(self) -> list[Request]:
        """By time of entering."""
        return self.residency.running

    @property
    def has_work(self) -> bool:
        return bool(self.roster.groups)

    @property
    def num_waiting(self) -> int:
        """Samples that wait, the unborn ones included."""
        return len(self.waiting) + self.roster.num_unborn

    def wait_seconds(self) -> float:
        """Predicted wait of a request that came now; none where nobody waits and a slot is free."""
        if not self.waiting.work and len(self.waiting) < len(self.residency.free_slots):
            return 0.0
        decodes = StepShape(len(self.running), sum(request.num_tokens for request in self.running), 0.0)
        return wait_seconds(
            self.steps.cost,
            decodes,
            prefill_seconds=self.waiting.work,
            prefill_tokens=self._budget(decodes, self.running).chunk(0, self.config.max_model_len) or 1,
            num_waiting=len(self.waiting) - len(self.residency.free_slots),
            num_running=len(self.running),
            mean_output=self._mean_output,
        )

    # ---------------------------------------------------------------- a step

    def may_plan_ahead(self) -> bool:
        """Whether the next step can be planned without the result of the one that is out.

        Not when a stream's next draw depends on a token that is not known: leaving that stream out instead would halve
        its pace, while waiting costs everybody no more than the host's part of a step. Nor when somebody would have to
        be preempted: what a step that is out computes for him would be lost.

        Nor when streams are guessed for: each goes on where its guesses end, and what is guessed next follows a token
        that is not known. Whether the step to plan would have guesses is taken from the latest one: when that changes,
        a stream misses its guesses in one step.
        """
        if self.drafting.is_on:
            return False
        decoding = [request for request in self.running if request.remaining == 1]
        if self._held_up or any(request.num_pending and request.params.looks_back for request in decoding):
            return False
        return sum(map(self.residency.is_full, decoding)) <= self.pool.num_free

    def schedule(self, now: float) -> StepPlan | None:
        """The next step; None when there is nothing to run. `now` in seconds, on the clock of the arrivals.

        While a plan is out only if `may_plan_ahead`; one at most. None may then mean: not before its result is known.
        """
        plan = StepPlan(self._step_id)
        self._at = None
        rows = self._rows = {}
        self.pool.now = now
        self._entered.clear()
        self._drawing = []
        self._held_up = False
        self._fill(plan, rows, now)
        while not rows and not plan.draws and not self._out and self.residency.unpin_one(()):
            self._fill(plan, rows, now)
        if not rows and not plan.draws:
            return None
        self._step_id += 1
        plan.freed, self.residency.freed = self.residency.freed, []
        plan.forgotten, self.residency.forgotten = self.residency.forgotten, []
        plan.rows = list(rows.values())
        self.shape = step_shape(plan.rows)
        self._out.append(_Out(plan, self.shape, list(rows), self._drawing))
        for request in self._drawing:
            request.num_pending += 1
        for request, row in rows.items():
            request.num_computed = row.start + (1 if row.draft else row.num_tokens)
            request.num_pending += row.samples
        return plan

    def start_over(self, error: Exception) -> list[Chunk]:
        """After `schedule` raised, with nothing out: end the request that it was at, and put all others back to where
        they waited. Nobody knows how far the plan had come, and what was computed can be found in the cache.

        Raises `error` if it was at none: then nobody is at fault but the scheduler.
        """
        guilty = self._at
        if guilty is None:
            raise error
        self._put_back()
        for request in list(self.running):
            self._preempt(request)
        return [self._fail(guilty, f"the request cannot be run: {type(error).__name__}")]

    def update(self, plan: StepPlan, result: StepResult, seconds: float | None = None) -> list[Chunk]:
        """Take in what a step gave: append tokens, publish full blocks, end what is finished.

        seconds: what the step took, for the step-time model. Plans are answered in their order; ValueError else.
        """
        if not self._out or plan is not self._out[0].plan or result.step_id != plan.step_id:
            raise ValueError(f"step {result.step_id} was answered out of turn")
        out = self._out.popleft()
        ran, shape = plan.rows, out.shape
        if any(row.draft for row in ran):
            ran = as_run(ran, result.rows)
            shape = step_shape(ran)
        self.drafting.observe(ran, shape, result, seconds)
        if self.policy.by_tenant:
            self._charge(out, ran, sum(done.seconds for done in result.drafting))
        chunks = []
        for request, got in zip(out.drawing, result.draws, strict=True):
            request.num_pending -= 1
            if request.finished:
                self.counters.discarded += len(got.token_ids)
            else:
                chunks.append(self._guarded(self._take, request, got, request.num_prompt))
        for request, row, got in zip(out.in_step, plan.rows, result.rows, strict=True):
            request.num_pending -= row.samples
            if request.finished:
                self._discard(request, row, got, out)
            else:
                chunks.append(self._guarded(self._advance, request, row, got))
        return [chunk for chunk in chunks if chunk is not None]

    def _guarded(self, work: Callable[..., Chunk | None], request: Request, *rest: object) -> Chunk | None:
        """The news of one request; if it cannot be had, the request ends by that, and no other."""
        try:
            return work(request, *rest)
        except Exception as error:
            log.exception("what a step gave to one request cannot be taken in")
            return self._fail(request, f"the request cannot be run: {type(error).__name__}")

    # ---------------------------------------------------------------- filling a step

    def _fill(self, plan: StepPlan, rows: dict[Request, Row], now: float) -> None:
        """Decide the rows of a step. Another discipline is a subclass with another `_fill`."""
        preemptions = self.counters.preemptions
        for request in [request for request in self.running if request.remaining == 1]:
            if request.slot >= 0:  # not preempted meanwhile, for an earlier one
                self._at = request
                self._grow(request, rows)
        self._at = None
        budget = self._budget(shape_of((row.start, row.num_tokens) for row in rows.values()), list(rows))
        # What was just freed by a preemption was freed for somebody else: nobody enters then.
        self._spend(plan, rows, budget, now, admit=self.counters.preemptions == preemptions)
        if self.config.draft_shape is not None:
            streams = [request for request in rows if request.num_output]
            self.drafting.add(rows, self._promised_seconds(streams), ahead=bool(self._out))

    def _budget(self, shape: StepShape, decoding: list[Request]) -> Budget:
        """What the step may still take in, beside the decodes that it has."""
        config, cost = self.config, self.steps.cost
        tokens, seconds = config.max_num_batched_tokens - shape.num_tokens, math.inf
        promised = self._promised_seconds(decoding)
        if promised < math.inf:
            seconds = promised
        elif decoding and config.max_num_prefill_tokens is not None:
            tokens = min(tokens, max(config.max_num_prefill_tokens, self._owed_tokens(decoding)))
        elif decoding:
            owed = self._owed_tokens(decoding)
            seconds = max(UNPROMISED / self.steps.margin, cost.seconds(shape.plus(0, owed)) if owed else 0.0)
        if config.chunking == "time":
            seconds = min(seconds, equal_time_seconds(cost, shape, tokens))
        return Budget(cost, shape, tokens, seconds, config.block_size)

    def _promised_seconds(self, decoding: list[Request]) -> float:
        """What a step may be predicted to take so that the tightest gap promised to these streams is kept."""
        limits = [request.group.slo.itl for request in decoding if request.group.slo.itl is not None]
        if self.config.slo_itl is not None:
            limits.append(self.config.slo_itl)
        return min(limits) / self.steps.margin if decoding and limits else math.inf

    def _owed_tokens(self, decoding: list[Request]) -> int:
        """Prompt tokens of the tenant that was served no more than any other whose streams run, if there is one.

        Nobody promised those streams a pace: the tenant may have its share in one piece, and pays for it.
        """
        if not self.policy.by_tenant:
            return 0
        begun: dict[str, int] = {}
        for request in self.running:
            if request.remaining > 1:
                begun[request.group.tenant] = begun.get(request.group.tenant, 0) + request.remaining
        served = self.service.seconds
        tenant = min((*self.waiting.lanes, *begun), key=served, default=None)
        others = {request.group.tenant for request in decoding} - {tenant}
        if tenant is None or not others or any(served(other) < served(tenant) for other in others):
            return 0
        head = self.waiting.head(tenant)
        return begun.get(tenant, 0) + (head.num_tokens if head is not None else 0)

    def _spend(self, plan: StepPlan, rows: dict[Request, Row], budget: Budget, now: float, *, admit: bool) -> None:
        """Give the budget to prompts in progress and, if `admit`, to who waits; then free slots to further samples."""
        admit = admit and (bool(self.residency.free_slots) or self.policy.displaces is not never)
        asking = self._asking(budget, admit)
        self._at = None
        entering = {request for request in asking if request.slot < 0}
        while asking:
            packed = pack([_want(request) for request in asking], copy(budget))
            for i in packed.passed_over:
                asking[i].passed_over += 1
            for i, count in packed.chosen:
                request = self._at = asking[i]
                if request in entering and (count or request.forks) and not self._enter(plan, request, now):
                    admit = False
                    break
                if request in self._drawing:
                    self._go_on(request, budget)
                elif count and request.slot >= 0:  # else somebody else took its place in this very step
                    row = rows[request] = self._row(request, min(count, request.remaining), ())
                    budget.spend(row.start, row.num_tokens)
            else:
                break
            # Nobody overtakes who only lacks memory: it would never have enough. Those in progress go on, all of them.
            asking = [request for request in self._asking(budget, admit) if request not in rows]
        self._fork(plan, budget, now, admit=admit)
        self._put_back()
        self._at = None

    def _asking(self, budget: Budget, admit: bool) -> list[Request]:
        """Who may have a place or a share of the budget, in the policy's order, as far as it could matter.

        Left out is who had better wait for a prefix that another is about to compute.
        """
        asking: list[Request] = []
        begins: set[bytes] = set()  # blocks that one of those who ask would compute first
        tokens = beyond = entering = passed_by = 0
        for request in self._in_order(admit):
            if beyond > WINDOW or passed_by >= PASSED_BY or entering > len(self.residency.free_slots) + WINDOW:
                break
            self._at = request
            if request.slot < 0 and not request.forks:
                if tokens <= budget.tokens:  # it may enter now
                    self.residency.prefix.look(request)
                if request.lacks in begins or self.residency.prefix.is_promised(request):
                    passed_by += 1
                    continue
                if request.lacks is not None:
                    begins.add(request.lacks)
            asking.append(request)
            entering += request.slot < 0
            tokens += _want(request).tokens
            beyond += tokens > budget.tokens
        return asking

    def _in_order(self, admit: bool) -> Iterator[Request]:
        """Prompts in progress and, if `admit`, waiting requests; these leave the queue for `_taken`."""
        begun: dict[str, list[Request]] = {}
        for request in self.running:
            if request.remaining > 1:
                begun.setdefault(self.roster.lane(request), []).append(request)
        lanes = {name: self._take_from(name) for name in (self.waiting.lanes if admit else ())}
        for name, requests in begun.items():
            requests.sort(key=_order)
            lanes[name] = heapq.merge(requests, lanes.get(name, ()), key=_order)
        return self.service.interleave(lanes, lambda request: request.work)

    def _take_from(self, lane: str) -> Iterator[Request]:
        for request in self.waiting.drain(lane):
            self._taken.append(request)
            yield request

    def _put_back(self) -> None:
        """Who was taken out of the queue and did not get a place waits on."""
        for request in self._taken:
            if request.slot < 0:
                self.roster.wait(request)
        self._taken.clear()

    def _row(self, request: Request, count: int, new_block_ids: tuple[int, ...]) -> Row:
        end = request.num_computed + count
        samples = end == request.num_tokens and request.draws
        group = request.group
        # The prompt's last logits serve the samples that are to come.
        keeps = samples and not request.num_output and group.num_unborn and not group.prefix
        return Row(
            request.slot, request.num_computed, count, new_block_ids, None, samples, group.key if keeps else None
        )

    def _grow(self, request: Request, rows: dict[Request, Row]) -> None:
        """A row of one token, with a new block if the last is full; others are preempted for it if there is none."""
        while (new := self.residency.grow(request)) is None:
            if self.residency.unpin_one({other.group for other in self.running}):
                continue
            victim = self._victim()
            if victim is request and self.residency.unpin_one(()):
                continue
            self._preempt(victim)
            if victim is request:
                return
        rows[request] = self._row(request, 1, new)

    # ---------------------------------------------------------------- entering

    def _enter(self, plan: StepPlan, request: Request, now: float) -> bool:
        """Let a waiting request into the batch; False, and no change, if there is no room for it."""
        entry = self.residency.enter(request, lambda num_blocks: self._make_room(request, num_blocks))
        if entry is None:
            return False
        plan.new.append(entry.sequence)
        if entry.copy is not None:
            plan.copies.append(entry.copy)
        self._entered.add(request)
        group, forked = request.group, request.remaining == 0
        self.service.enters(group.tenant)
        if self.config.prefix_caching and not forked:
            self.counters.prefix_query_tokens += request.num_tokens
            self.counters.prefix_hit_tokens += request.num_computed
            shared = request.block_ids[: request.num_published]
            group.session_turn = group.session_turn or any(self.pool.holds_output(block) for block in shared)
        if forked:
            plan.draws.append(Draw(request.slot, group.key))
            self._drawing.append(request)
        if request.num_preemptions == 0:
            request.num_cached = 0 if forked else request.num_computed
            request.queued_seconds = now - group.arrival
        return True

    def _make_room(self, request: Request, num_blocks: int) -> bool:
        """Whether there is a slot and `num_blocks` free, if need be by taking the place of who matters less.

        While a step is out nobody's place is taken; the next one is then planned with nothing out.
        """
        while not self.residency.has_room(num_blocks):
            spared = {request.group, *(other.group for other in self.running)}
            if self.residency.free_slots and self.residency.unpin_one(spared):
                continue
            displaced = self._displaced_by(request)
            if displaced is None:
                return False
            if self._out:
                self._held_up = True
                return False
            self._preempt(displaced)
        return True

    def _displaced_by(self, request: Request) -> Request | None:
        """The running request that has computed least of those whose place `request` may take."""
        candidates = [
            other
            for other in self.running
            if other.num_preemptions < PATIENCE
            and other not in self._entered
            and self.policy.displaces(request, other, self.service)
        ]
        return min(candidates, key=lambda r: (r.num_computed, -r.order[1]), default=None)

    def _fork(self, plan: StepPlan, budget: Budget, now: float, *, admit: bool) -> None:
        """The next samples of groups of which one has just forked: into free slots in turn, or into the queue.

        A sample queues up when the one before it has its place: many samples of a request are one customer.
        """
        turn = deque(request.group for request in self._drawing)
        while turn:
            group = turn.popleft()
            request = self._at = self.roster.next_sample(group, now)
            if request is not None:
                self._taken.append(request)
                if admit and self.residency.free_slots and request.forks and self._enter(plan, request, now):
                    self._go_on(request, budget)
                    turn.append(group)

    def _go_on(self, request: Request, budget: Budget) -> None:
        """A row for the first token of a sample that has just forked: it is drawn before the rows of the step run."""
        if request.params.looks_back:  # nobody knows that token when the row's is drawn
            return
        if request.params.max_tokens > 1 and budget.chunk(request.num_prompt, 1):
            self._rows[request] = Row(request.slot, request.num_prompt, 1)
            budget.spend(request.num_prompt, 1)

    # ---------------------------------------------------------------- leaving for a while

    def _victim(self) -> Request:
        """Who gives way: never the first in order (unless alone); of the others the least computed, the latest."""
        first = min(self.running, key=lambda r: r.order)
        others = [r for r in self.running if r is not first] or [first]
        return min(others, key=lambda r: (r.num_preemptions >= PATIENCE, r.num_computed, -r.order[1]))

    def _preempt(self, request: Request) -> None:
        """Back to the waiting; its blocks are free but stay findable, so much of it may be a cache hit on return."""
        if self._out:
            raise RuntimeError(
                "a request would be preempted while a step is out; may_plan_ahead() was to be asked first"
            )
        self.roster.leave(request)
        self._rows.pop(request, None)
        request.num_computed = 0
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self.roster.wait(request)

    # ---------------------------------------------------------------- after a step

    def _advance(self, request: Request, row: Row, got: RowResult) -> Chunk | None:
        if row.draft is not None and got.error is None:
            self.drafting.learn(request, row.draft, got)
            request.num_computed = row.start + len(got.token_ids)
        end = request.num_computed if row.draft else row.start + row.num_tokens
        if got.error is None:
            if row.start < request.num_prompt:
                self.counters.prompt_tokens += min(end, request.num_prompt) - row.start
            if row.start < request.max_computed:
                known = min(end, request.max_computed) - row.start
                self.counters.recomputed_tokens += known
                got.prompt_logprobs = got.prompt_logprobs and got.prompt_logprobs[known:]
            request.max_computed = max(request.max_computed, end)
            if row.keeps is not None:
                self.residency.pin(request)
                self.roster.offer(request.group, request.group.arrival)
        else:
            if got.unsound:
                self._doubt(request, row)
            if row.keeps is not None:
                self._forget(request.group)
        return self._take(request, got, end)

    def _doubt(self, request: Request, row: Row) -> None:
        """`row` gave no numbers: nobody finds any more what `request` wrote.

        Nor what it had found, if this was its first row: a bad block would end everybody who shares it, and each of
        them would keep it young. Where an earlier row has read that and gave numbers, it is no suspect.
        """
        whole = row.start == request.num_found
        self.pool.retract(request.block_ids[0 if whole else request.num_found // self.config.block_size :])

    def _discard(self, request: Request, row: Row, got: RowResult, out: _Out) -> None:
        """The row of a sample that has ended; one that forked in this very step has been counted, or ended by it."""
        if request not in out.drawing:
            self.counters.discarded += len(got.token_ids)
        if row.keeps is not None:
            self._forget(request.group)

    def _forget(self, group: Group) -> None:
        """The logits that a row kept for `group` will not be used, unless a later plan keeps them anew."""
        if not any(row.keeps == group.key for out in self._out for row in out.plan.rows):
            self.residency.forgotten.append(group.key)

    def _take(self, request: Request, got: RowResult, num_computed: int) -> Chunk | None:
        """Append what was drawn when `num_computed` tokens were computed; the news, if there are any."""
        if got.error is not None:
            return self._fail(request, got.error)
        finish: str | None = None
        stop: int | None = None
        drawn = 0
        for token in got.token_ids:
            drawn += 1
            request.token_ids.append(token)
            finish, stop = self._stop(request, token)
            if finish:
                break
        if not request.draws and num_computed == len(request.token_ids):
            finish = "length"
        accepted = self.drafting.count(got, drawn)
        self.counters.generated_tokens += drawn
        known = min(num_computed, len(request.token_ids))  # an end among accepted tokens leaves the rest unsaid
        if known // self.config.block_size != request.num_published:
            self.residency.prefix.publish(request, known)
        if finish:
            num_output = len(request.token_ids) - request.num_prompt
            self._mean_output += (num_output - self._mean_output) * (OUTPUT_MEMORY if self._mean_output else 1)
            self.roster.finish(request)
        if not drawn and not finish and not got.prompt_logprobs:
            return None
        chunk = Chunk(request.request_id, request.index, got.token_ids[:drawn], finish, stop)
        chunk.logprobs = got.logprobs and got.logprobs[:drawn]
        chunk.prompt_logprobs = got.prompt_logprobs
        chunk.num_cached, request.num_cached = request.num_cached, -1
        chunk.queued_seconds, request.queued_seconds = request.queued_seconds, -1.0
        chunk.num_drafted, chunk.num_accepted = got.drafted, accepted
        return chunk

    def _fail(self, request: Request, reason: str) -> Chunk:
        """End a request for a fault of its own; others go on sharing what it has put into the cache."""
        if not request.finished:
            self.roster.finish(request)
        self.counters.failed += 1
        return Chunk(request.request_id, request.index, [], finish_reason="error", error=reason)

    def _stop(self, request: Request, token: int) -> tuple[str | None, int | None]:
        params, num_tokens = request.params, len(request.token_ids)
        num_output = num_tokens - request.num_prompt
        is_loop = request.loops is not None and request.loops.push(request.token_ids, num_output)
        old_enough = num_output >= params.min_tokens
        # A grammar lets an end through earlier where its text is complete, and nothing may follow then.
        is_end = token in self.config.eos_token_ids and not params.ignore_eos
        if is_end and (old_enough or params.grammar is not None):
            return "stop", None
        if old_enough:
            if token in params.stop_token_ids:
                return "stop", token
            if is_loop:
                return "repetition", None
        if num_tokens >= request.group.max_len:
            return "length", None
        return None, None

    def _charge(self, out: _Out, ran: list[Row], guessing: float) -> None:
        """Each tenant pays for its rows, and its part of what every step costs; of `guessing` for its guesses."""
        cost = self.steps.cost
        nodes = sum(row.num_tokens - 1 for row in ran if row.draft) or 1
        for request, row in zip(out.in_step, ran, strict=True):
            seconds = cost.base / len(ran)
            if row.draft or row.num_tokens == 1:
                seconds += cost.per_tile / cost.tile + cost.per_context * row.start
            if row.draft:
                guesses = row.num_tokens - 1
                seconds += cost.work_seconds(row.start + 1, guesses) + guessing * guesses / nodes
            elif row.num_tokens > 1:
                seconds += cost.work_seconds(row.start, row.num_tokens)
            self.service.charge(request.group.tenant, seconds)

    def check(self) -> None:
        """Raise RuntimeError unless every block, slot and request is accounted for."""
        self.roster.check()
