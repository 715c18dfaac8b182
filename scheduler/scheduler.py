"""Which tokens run in the next step.

    add() / abort() ──▶ waiting ──▶ running ──schedule()──▶ StepPlan ──runner──▶ StepResult ──update()──▶ Chunks

A step is filled in this order, within `max_num_batched_tokens`:
    1. every running request that only lacks its next token: streams never wait for a prompt (Sarathi-Serve,
       arXiv 2403.02310, algorithm 3);
    2. running requests with more to compute, oldest first;
    3. waiting requests, with blocks for all their known tokens reserved at admission, above a watermark.
While anything decodes, 2 and 3 together take at most `max_num_prefill_tokens`: that bounds the streams' gap.
Out of blocks, the running request that has computed least is preempted and recomputed later, never the oldest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .block_pool import BlockContent, BlockPool
from .hashing import root_key
from .params import SamplingParams
from .plan import Chunk, NewSeq, Row, RowResult, StepPlan, StepResult
from .queue import WaitingQueue, order
from .request import Request

# Waiting requests looked at beyond those admitted: some only wait for a prefix that another is computing.
ADMISSION_WINDOW = 64

# Share of the blocks kept free at admission, so that running requests can grow before the next preemption
# (the value of the Sarathi-Serve scheduler).
WATERMARK = 0.01

# A request preempted this often is chosen last, so that nobody is thrown back for ever.
PATIENCE = 3


class Refused(ValueError):
    """A request that could never run; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_prefill_tokens: int
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    prefix_caching: bool = True
    cache_context: tuple[str, ...] = ()  # what else K/V depends on: model, KV format, RoPE

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens} and max_num_seqs {self.max_num_seqs}: "
                "a step must hold one token of every sequence; raise the first or lower the second"
            )
        if self.max_num_prefill_tokens < 1:
            raise ValueError(f"max_num_prefill_tokens is {self.max_num_prefill_tokens}: at least 1 is needed")
        capacity = (self.num_blocks - 1) * self.block_size
        if self.max_model_len > capacity:
            raise ValueError(
                f"max_model_len is {self.max_model_len}, but the KV cache holds {capacity} tokens: "
                "lower max_model_len or give the cache more memory"
            )


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    aborted: int = 0
    failed: int = 0


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.counters = Counters()
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # by time of admission
        self._samples: dict[str, list[Request]] = {}  # request id -> its unfinished samples
        self._free_slots = [*range(config.max_num_seqs - 1, -1, -1)]
        self._freed: list[int] = []  # slots to clear in the next plan
        self._promised: dict[bytes, int] = {}  # key of a block being computed now -> how many compute it
        self._in_step: list[Request] = []  # beside the rows of the plan that is out
        self._step_id = 0
        self._serial = 0

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
    ) -> None:
        """Queue params.n samples of a prompt. Raises Refused for what could never run; nothing is queued then."""
        if request_id in self._samples:
            raise Refused(f"request id {request_id!r} is in use")
        if not prompt_ids:
            raise Refused("the prompt is empty: at least one token is needed")
        if len(prompt_ids) + (params.max_tokens > 0) > self.config.max_model_len:
            raise Refused(f"the prompt has {len(prompt_ids)} tokens, the context {self.config.max_model_len}")
        root = root_key(cache_salt, *self.config.cache_context)
        samples = []
        for index in range(params.n):
            place = order(priority, arrival, self._serial)
            self._serial += 1
            samples.append(Request(request_id, index, list(prompt_ids), len(prompt_ids), params, arrival, place, root))
        self._samples[request_id] = samples
        for request in samples:
            self.waiting.push(request)

    def abort(self, request_id: str, index: int | None = None) -> list[Chunk]:
        """End one sample of a request, or all, now; blocks return at once. What is unknown has ended already.

        Call between steps.
        """
        chunks = []
        for request in list(self._samples.get(request_id, ())):
            if index not in (None, request.index):
                continue
            self._finish(request)
            self.counters.aborted += 1
            chunks.append(Chunk(request.request_id, request.index, [], finish_reason="abort"))
        return chunks

    @property
    def has_work(self) -> bool:
        return bool(self._samples)

    # ---------------------------------------------------------------- a step

    def schedule(self, now: float) -> StepPlan | None:
        """The next step; None when there is nothing to run. `now` in seconds, on the clock of the arrivals."""
        plan = StepPlan(self._step_id)
        rows: dict[Request, Row] = {}
        preemptions = self.counters.preemptions
        for request in [request for request in self.running if request.remaining == 1]:
            if request.slot >= 0:  # not preempted meanwhile, for an earlier one
                self._grow(request, rows)

        budget = self.config.max_num_batched_tokens - len(rows)
        if rows:
            budget = min(budget, self.config.max_num_prefill_tokens)
        for request in self.running:
            if budget > 0 and request.remaining > 1:
                count = min(request.remaining, budget)
                rows[request] = self._row(request, count, ())
                budget -= count
        if self.counters.preemptions == preemptions:  # what was just freed was freed for somebody else
            self._admit(plan, rows, budget, now)

        if not rows:
            return None
        self._step_id += 1
        plan.freed, self._freed = self._freed, []
        plan.rows = list(rows.values())
        self._in_step = list(rows)
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[Chunk]:
        """Take in what a step gave: append tokens, publish full blocks, end what is finished."""
        chunks = []
        for request, row, got in zip(self._in_step, plan.rows, result.rows, strict=True):
            chunk = self._advance(request, row, got)
            if chunk is not None:
                chunks.append(chunk)
        self._in_step = []
        return chunks

    # ---------------------------------------------------------------- filling a step

    def _row(self, request: Request, count: int, new_block_ids: tuple[int, ...]) -> Row:
        end = request.num_computed + count
        samples = end == request.num_tokens and request.draws
        return Row(request.slot, request.num_computed, count, new_block_ids, samples=samples)

    def _grow(self, request: Request, rows: dict[Request, Row]) -> None:
        """A row of one token, with a new block if the last is full; others are preempted for it if there is none."""
        new: list[int] = []
        if request.num_tokens > len(request.block_ids) * self.config.block_size:
            while not (new := self.pool.take(1) or []):
                victim = self._victim()
                rows.pop(victim, None)
                self._preempt(victim)
                if victim is request:
                    return
            request.block_ids += new
        rows[request] = self._row(request, 1, tuple(new))

    def _victim(self) -> Request:
        """Who gives way: never the oldest (unless alone); of the others the least computed, the youngest of equals."""
        oldest = min(self.running, key=lambda r: r.order)
        others = [r for r in self.running if r is not oldest] or [oldest]
        return min(others, key=lambda r: (r.num_preemptions >= PATIENCE, r.num_computed, -r.order[1]))

    def _preempt(self, request: Request) -> None:
        """Back to the waiting; its blocks are free but stay findable, so much of it may be a cache hit on return."""
        self._leave(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self.waiting.push(request)

    def _admit(self, plan: StepPlan, rows: dict[Request, Row], budget: int, now: float) -> None:
        passed: list[Request] = []
        for request in self._candidates(passed, budget):
            if self._is_promised(request):
                passed.append(request)
                continue
            if not self._enter(plan, request):
                passed.append(request)
                break
            if request.num_preemptions == 0:
                request.num_cached = request.num_computed
                request.queued_seconds = now - request.arrival
            count = min(request.remaining, budget)
            rows[request] = self._row(request, count, ())
            budget -= count
            if budget <= 0 or not self._free_slots:
                break
        for request in passed:
            self.waiting.push(request)

    def _candidates(self, passed: list[Request], budget: int) -> Iterable[Request]:
        if budget <= 0 or not self._free_slots:
            return
        for request in self.waiting.drain():
            yield request
            if len(passed) >= ADMISSION_WINDOW:
                return

    def _is_promised(self, request: Request) -> bool:
        """Whether a running request is computing the very block that this one would compute first.

        Then waiting is cheaper than computing it twice: it will be a cache hit, or a fork of a sibling's prompt.
        """
        leader = next((s for s in self._samples[request.request_id] if s.slot >= 0), None)
        if leader and not request.num_output and leader.num_computed < leader.num_prompt:
            return True
        if not self._may_share(request) or not self._promised:
            return False
        if request.waits_for not in self._promised:
            found = len(self._match(request))
            full = (request.num_tokens - 1) // self.config.block_size
            request.waits_for = request.block_keys[found] if found < full else None
        return request.waits_for in self._promised

    def _enter(self, plan: StepPlan, request: Request) -> bool:
        """Give a waiting request a slot and blocks for all its tokens; False, and no change, if they are not there."""
        size = self.config.block_size
        source = self._fork_source(request)
        shared, copied = source if source else (self._match(request), None)
        needed = -(-request.num_tokens // size) - len(shared)
        watermark = int(WATERMARK * self.config.num_blocks) if self.running else 0
        for block in shared:
            self.pool.share(block)
        if self.pool.num_free < needed + watermark or (fresh := self.pool.take(needed)) is None:
            self.pool.release(reversed(shared))
            return False
        if copied is not None:
            plan.copies.append((copied, fresh[0]))
        request.block_ids = shared + fresh
        request.num_computed = request.num_prompt - 1 if source else len(shared) * size
        request.num_published = len(shared)
        if self.config.prefix_caching and not source:
            self.counters.prefix_query_tokens += request.num_tokens
            self.counters.prefix_hit_tokens += request.num_computed
        request.slot = self._free_slots.pop()
        self.running.append(request)
        self._promise(request)
        plan.new.append(
            NewSeq(
                request.slot,
                tuple(request.token_ids),
                request.num_prompt,
                request.params,
                request.index,
                tuple(request.block_ids),
            )
        )
        return True

    def _fork_source(self, request: Request) -> tuple[list[int], int | None] | None:
        """A sibling's prompt to share: its full blocks, and the block to copy that holds the last prompt token.

        The last prompt token is computed again, for its logits, into a block of the request's own.
        """
        if request.num_output:
            return None
        for sibling in self._samples[request.request_id]:
            if sibling.slot >= 0 and sibling.num_computed >= sibling.num_prompt:
                full, rest = divmod(request.num_prompt - 1, self.config.block_size)
                return sibling.block_ids[:full], sibling.block_ids[full] if rest else None
        return None

    def _may_share(self, request: Request) -> bool:
        # Prompt logprobs need every prompt token's logits, so the first sample has to compute every prompt token.
        return self.config.prefix_caching and (request.params.prompt_logprobs is None or request.index > 0)

    def _match(self, request: Request) -> list[int]:
        """The longest run of cached blocks that the request begins with; its last token is always left to compute."""
        if not self._may_share(request):
            return []
        blocks: list[int] = []
        size, parent = self.config.block_size, request.root
        for i, key in enumerate(request.keys(size, (request.num_tokens - 1) // size)):
            block = self.pool.find(key, parent, request.token_ids[i * size : (i + 1) * size])
            if block is None:
                break
            blocks.append(block)
            parent = key
        return blocks

    def _promise(self, request: Request) -> None:
        """Announce the full blocks that `request` has yet to compute."""
        if self.config.prefix_caching:
            request.num_promised = request.num_tokens // self.config.block_size
            for key in request.keys(self.config.block_size, request.num_promised)[request.num_published :]:
                self._promised[key] = self._promised.get(key, 0) + 1

    def _settle(self, request: Request, upto: int) -> None:
        """Take back the announcements of blocks num_published .. upto - 1: they are there, or will not be."""
        for key in request.block_keys[request.num_published : min(upto, request.num_promised)]:
            self._promised[key] -= 1
            if not self._promised[key]:
                del self._promised[key]

    # ---------------------------------------------------------------- after a step

    def _advance(self, request: Request, row: Row, got: RowResult) -> Chunk | None:
        if got.error is not None:
            self.pool.retract(request.block_ids)
            self._finish(request)
            self.counters.failed += 1
            return Chunk(request.request_id, request.index, [], finish_reason="error", error=got.error)

        end = row.start + row.num_tokens
        self.counters.prompt_tokens += max(0, min(end, request.num_prompt) - row.start)
        self.counters.recomputed_tokens += max(0, min(end, request.max_computed) - row.start)
        prompt_logprobs = got.prompt_logprobs and got.prompt_logprobs[max(0, request.max_computed - row.start) :]
        request.num_computed = end
        request.max_computed = max(request.max_computed, end)

        drawn: list[int] = []
        finish: str | None = None
        stop: int | None = None
        for token in got.token_ids:
            drawn.append(token)
            request.token_ids.append(token)
            finish, stop = self._stop(request, token)
            if finish:
                break
        if not request.draws and request.remaining == 0:
            finish = "length"
        self.counters.generated_tokens += len(drawn)
        self._publish(request)
        if not drawn and not finish and not prompt_logprobs:
            return None

        if finish:
            self._finish(request)
        chunk = Chunk(request.request_id, request.index, drawn, finish, stop)
        chunk.logprobs = got.logprobs[: len(drawn)] if got.logprobs is not None else None
        chunk.prompt_logprobs = prompt_logprobs
        chunk.num_cached, request.num_cached = request.num_cached, -1
        chunk.queued_seconds, request.queued_seconds = request.queued_seconds, -1.0
        return chunk

    def _stop(self, request: Request, token: int) -> tuple[str | None, int | None]:
        params = request.params
        if request.num_output >= params.min_tokens:
            if token in self.config.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token in params.stop_token_ids:
                return "stop", token
        if request.num_output >= params.max_tokens or request.num_tokens >= self.config.max_model_len:
            return "length", None
        return None, None

    def _publish(self, request: Request) -> None:
        if not self.config.prefix_caching:
            return
        size = self.config.block_size
        full = request.num_computed // size
        if full == request.num_published:
            return
        keys = request.keys(size, full)
        self._settle(request, full)
        for i in range(request.num_published, full):
            parent = keys[i - 1] if i else request.root
            tokens = tuple(request.token_ids[i * size : (i + 1) * size])
            self.pool.publish(request.block_ids[i], BlockContent(keys[i], parent, tokens))
        request.num_published = full

    # ---------------------------------------------------------------- leaving

    def _leave(self, request: Request) -> None:
        """Give back slot and blocks."""
        self._settle(request, request.num_promised)
        self.running.remove(request)
        self.pool.release(reversed(request.block_ids))
        request.block_ids = []
        self._freed.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1

    def _finish(self, request: Request) -> None:
        request.finished = True
        if request.slot >= 0:
            self._leave(request)
        else:
            self.waiting.discard(request)
        samples = self._samples[request.request_id]
        samples.remove(request)
        if not samples:
            del self._samples[request.request_id]

    # ---------------------------------------------------------------- self-check

    def check(self) -> None:
        """Raise RuntimeError unless every block, slot and request is accounted for."""
        self.pool.check(request.block_ids for request in self.running)
        slots = sorted([*self._free_slots, *(request.slot for request in self.running)])
        if slots != list(range(self.config.max_num_seqs)):
            raise RuntimeError(f"slots are lost or doubled: {slots}")
        for request in self.running:
            if not request.num_published * self.config.block_size <= request.num_computed <= request.num_tokens:
                raise RuntimeError(f"counters of {request.request_id} are out of order: {request}")
        alive = sum(len(samples) for samples in self._samples.values())
        if alive != len(self.waiting) + len(self.running):
            raise RuntimeError(f"{alive} samples alive, {len(self.waiting)} wait and {len(self.running)} run")
