"""The scheduler against a model of the cache: whatever is added, aborted and preempted, every row finds in its blocks
exactly the tokens that precede it, every request gets the tokens of its solo run, and nothing is lost.

A step is executed when it is planned, as a device does, and answered after up to `ahead` more are planned. Where it has
guesses, any number of them is made and any number of these is right. Rows fail, and some of these leave no numbers.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict, deque

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.drafts import parse_shape
from quire.scheduler.params import SamplingParams, Slo, Speculative
from quire.scheduler.plan import DraftPass, Row, RowResult, StepPlan, StepResult
from quire.scheduler.policy import POLICIES
from quire.scheduler.roster import Refused
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step_time import StepCost

VOCAB = 3  # few tokens, so that prompts share beginnings by chance
EOS = 2
COST = StepCost(tile=1, base=1e-3, per_tile=1e-4, per_context=1e-7, per_pair=1e-8)


def next_token(token_ids: list[int], sample: int) -> int:
    """A 'model': the next token is a function of all tokens before it and the sample's number."""
    return hashlib.sha256(bytes([sample, *token_ids])).digest()[0] % VOCAB


class CacheModel:
    """Plays the runner. Blocks hold the tokens written to them; a row that would read anything else is an error."""

    def __init__(self, config: SchedulerConfig, seed: int, faults: float) -> None:
        """faults: share of the rows that fail."""
        self.random = random.Random(seed)
        self.faults = faults
        self.broken: set[int] = set()  # slots of which a row has failed
        self.size = config.block_size
        self.max_model_len = config.max_model_len
        self.failed: set[int] = set()  # slots whose guessing failed
        self.blocks: dict[int, list[int | None]] = defaultdict(lambda: [None] * self.size)
        self.slots: dict[int, tuple[list[int], list[int], int, int]] = {}
        self.longest: dict[int, int] = {}  # slot -> tokens at which its sequence has its full length
        self.kept: dict[int, list[int]] = {}  # key -> the tokens behind the logits that are kept

    def execute(self, plan: StepPlan) -> StepResult:
        for key in plan.forgotten:
            self.kept.pop(key, None)
        for slot in plan.freed:
            del self.slots[slot]
            self.failed.discard(slot)
            self.broken.discard(slot)
        for new in plan.new:
            assert new.slot not in self.slots
            max_tokens = new.params.max_tokens
            self.longest[new.slot] = min(new.num_prompt + max_tokens, self.max_model_len)
            self.slots[new.slot] = (list(new.token_ids), list(new.block_ids), new.sample_index, max_tokens)
        for source, target in plan.copies:
            self.blocks[target] = list(self.blocks[source])
        draws = []
        for draw in plan.draws:
            token_ids, block_ids, sample, max_tokens = self.slots[draw.slot]
            held = [token for block in block_ids for token in self.blocks[block]][: len(token_ids)]
            assert held == token_ids == self.kept[draw.kept], "drawn from another prompt's logits"
            drawn = next_token(token_ids, sample)
            token_ids.append(drawn)
            draws.append(RowResult([drawn]))
        results = []
        written = set()
        for row in plan.rows:
            token_ids, block_ids, sample, max_tokens = self.slots[row.slot]
            block_ids += row.new_block_ids
            end = row.start + row.num_tokens
            if row.draft:
                assert row.num_tokens == 1 + row.draft.shape.nodes > 1
                assert row.start == len(token_ids) - 1
                assert row.slot not in self.failed, "guesses for a sequence whose guessing failed"
                assert end <= self.max_model_len
                assert len(token_ids) + row.draft.shape.depth < self.longest[row.slot], "more than may be drawn"
            else:
                assert row.num_tokens > 0
                assert end <= len(token_ids)
            assert end <= len(block_ids) * self.size
            assert 0 not in block_ids
            held = [token for block in block_ids for token in self.blocks[block]][: row.start]
            sound = row.slot in self.broken or held == token_ids[: row.start]
            assert sound, "the row's context is not what its blocks hold"
            for position in range(row.start, end):
                place = (block_ids[position // self.size], position % self.size)
                assert place not in written, "two rows write one place"
                written.add(place)
        for row in plan.rows:
            if row.draft:
                results.append(self.verify(row))
                continue
            token_ids, block_ids, sample, max_tokens = self.slots[row.slot]
            end = row.start + row.num_tokens
            for position in range(row.start, end):
                self.blocks[block_ids[position // self.size]][position % self.size] = token_ids[position]
            assert row.samples == (end == len(token_ids) and max_tokens > 0)
            if row.keeps is not None:
                assert row.samples
                self.kept[row.keeps] = list(token_ids)
            drawn = [next_token(token_ids, sample)] if row.samples else []
            token_ids += drawn
            fails = row.slot not in self.broken and self.random.random() < self.faults
            results.append(self.fail(row) if fails else RowResult(drawn))
        guesses = Counter(row.draft.method for row in plan.rows if row.draft)
        drafting = [DraftPass(method, method != "ngram", count, 1e-4 * count) for method, count in guesses.items()]
        return StepResult(plan.step_id, results, draws, drafting)

    def verify(self, row: Row) -> RowResult:
        """Some of the nodes were guessed, their K/V lie behind the last token, and some levels were right."""
        token_ids, block_ids, sample, _ = self.slots[row.slot]
        shape = row.draft.shape
        depth = self.random.randint(0, shape.depth)
        nodes = self.random.randint(depth, shape.cut(depth).nodes)
        accepted = self.random.randint(0, depth)
        for i in range(nodes):
            self.write(block_ids, row.start + 1 + i, -1)
        drawn = []
        for _ in range(accepted + 1):
            self.write(block_ids, len(token_ids) - 1, token_ids[-1])  # the last is never computed
            drawn.append(next_token(token_ids, sample))
            token_ids.append(drawn[-1])
        if not nodes and self.random.random() < 0.2:
            self.failed.add(row.slot)
            return RowResult(drawn, draft_error="the proposer raised")
        return RowResult(drawn, drafted=nodes, draft_depth=depth)

    def fail(self, row: Row) -> RowResult:
        """Half of those that fail have written no numbers."""
        _, block_ids, _, _ = self.slots[row.slot]
        unsound = self.random.random() < 0.5
        if unsound:
            for position in range(row.start, row.start + row.num_tokens):
                self.write(block_ids, position, -1)
        self.broken.add(row.slot)
        return RowResult(error="it failed", unsound=unsound)

    def write(self, block_ids: list[int], position: int, token: int) -> None:
        self.blocks[block_ids[position // self.size]][position % self.size] = token


def solo(prompt: list[int], params: SamplingParams, sample: int, max_model_len: int) -> tuple[list[int], str]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < params.max_tokens:
        tokens.append(next_token(tokens, sample))
        drawn = len(tokens) - len(prompt)
        if tokens[-1] == EOS and not params.ignore_eos and drawn >= params.min_tokens:
            return tokens[len(prompt) :], "stop"
        if len(tokens) >= max_model_len:
            break
    return tokens[len(prompt) :], "length"


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(8, 32),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 6),
        extra=st.integers(0, 12),
        prefill=st.integers(1, 12),
        caching=st.booleans(),
        policy=st.sampled_from(sorted(POLICIES)),
        chunking=st.sampled_from(["tokens", "time"]),
        eviction=st.sampled_from(["lru", "discard", "phase"]),
        slo_itl=st.sampled_from([None, 0.001, 0.002, 0.1]),
        ahead=st.integers(0, 1),
        shape=st.sampled_from([None, "chain:1", "chain:4", "rsd-c:2,2", "rsd-s:2x3"]),
        method=st.sampled_from(["draft", "ngram"]),
        adaptive=st.booleans(),
        faults=st.sampled_from([0.0, 0.0, 0.1]),
        seed=st.integers(0, 99),
    )
    def start(
        self,
        num_blocks,
        block_size,
        max_num_seqs,
        extra,
        prefill,
        caching,
        policy,
        chunking,
        eviction,
        slo_itl,
        ahead,
        shape,
        method,
        adaptive,
        faults,
        seed,
    ):
        draft_shape = shape and parse_shape(shape, 0)
        if draft_shape and draft_shape.nodes >= max_num_seqs + extra:
            draft_shape = None
        capacity = (num_blocks - 1) * block_size
        self.config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra,
            max_num_prefill_tokens=prefill,
            max_model_len=min(capacity, 40),
            eos_token_ids=frozenset([EOS]),
            prefix_caching=caching,
            policy=policy,
            tenant_weights={"a": 3.0},
            slo_itl=slo_itl,
            chunking=chunking,
            eviction=eviction,
            draft_method=method if draft_shape else "none",
            draft_shape=draft_shape,
            adaptive_drafts=adaptive,
        )
        self.scheduler = Scheduler(self.config, COST)
        self.runner = CacheModel(self.config, seed, faults)
        self.ahead = ahead
        self.out = deque()  # plan, its result, who draws in it
        self.in_vain = Counter()  # request -> tokens that were drawn for it after its end
        self.clock = 0.0
        self.expected: dict[tuple[str, int], tuple[list[int], str]] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], str] = {}
        self.count = 0

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
        max_tokens=st.integers(0, 20),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        n=st.integers(1, 4),
        looks_back=st.booleans(),
        priority=st.integers(-2, 2),
        salt=st.sampled_from(["", "a"]),
        tenant=st.sampled_from(["", "a", "b"]),
        slo=st.builds(
            Slo,
            ttft=st.sampled_from([None, 0.01, 5.0]),
            itl=st.sampled_from([None, 0.0005, 0.01]),
            deadline=st.sampled_from([None, 0.001, 3.0, 50.0]),
        ),
        timeout=st.sampled_from([None, None, 0.5, 20.0]),
        speculative=st.builds(
            Speculative,
            method=st.sampled_from([None, None, "none", "ngram"]),
            num_tokens=st.sampled_from([None, None, 0, 1]),
        ),
    )
    def add(
        self,
        prompt,
        max_tokens,
        min_tokens,
        ignore_eos,
        n,
        looks_back,
        priority,
        salt,
        tenant,
        slo,
        timeout,
        speculative,
    ):
        if self.config.draft_shape is None:
            speculative = Speculative()
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            n=n,
            presence_penalty=0.5 if looks_back else 0.0,
        )
        self.clock += 1
        request_id = f"r{self.count}"
        self.count += 1
        too_long = len(prompt) + (max_tokens > 0) > self.config.max_model_len
        try:
            self.scheduler.add(
                request_id,
                prompt,
                params,
                priority=priority,
                arrival=self.clock,
                cache_salt=salt,
                tenant=tenant,
                slo=slo,
                timeout=timeout,
                speculative=speculative,
            )
        except Refused:
            assert too_long
            return
        assert not too_long
        for sample in range(n):
            self.expected[request_id, sample] = solo(prompt, params, sample, self.config.max_model_len)
            self.got[request_id, sample] = []

    @rule(
        count=st.integers(20, 40),
        length=st.integers(1, 8),
        priority=st.integers(-2, 2),
        ttft=st.sampled_from([None, 5.0]),
    )
    def flood(self, count, length, priority, ttft):
        """More come at once, each a tenant of its own, than a step looks at."""
        for i in range(count):
            self.add(
                prompt=[i // VOCAB**place % VOCAB for place in range(length)],
                max_tokens=2,
                min_tokens=0,
                ignore_eos=True,
                n=1,
                looks_back=False,
                priority=priority,
                salt="",
                tenant=f"t{self.count}",
                slo=Slo(ttft=ttft),
                timeout=None,
                speculative=Speculative(),
            )

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted({r for r, _ in self.expected})))
        self._take(self.scheduler.abort(request_id))
        assert self.scheduler.abort(request_id) == []

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self._step()

    def _step(self) -> bool:
        """Answer one plan, after as many were made as may be."""
        while len(self.out) <= self.ahead and (not self.out or self.scheduler.may_plan_ahead()):
            if not self._plan():
                break
        if not self.out:
            assert not self.scheduler.has_work, "there is work and nothing runs"
            return False
        plan, result, drawing = self.out.popleft()
        self.in_vain.update(request for request in drawing if request.finished)
        self._take(self.scheduler.update(plan, result, seconds=0.001))
        assert all(count == 1 for count in self.in_vain.values()), "more than one token drawn in vain"
        assert self.in_vain.total() == self.scheduler.counters.discarded
        assert self.ahead or not self.in_vain
        return True

    def _plan(self) -> bool:
        decoding = [r for r in self.scheduler.running if r.remaining == 1]
        self.clock += 0.002
        self._take(self.scheduler.expire(self.clock))
        decoding = [r for r in decoding if not r.finished]
        oldest = min(self.scheduler.running, key=lambda r: r.order, default=None)
        before = {r: r.num_computed for r in self.scheduler.running}
        plan = self.scheduler.schedule(self.clock)
        if plan is None:
            return False
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        guessing = [row for row in plan.rows if row.draft]
        assert not guessing or not self.out, "guesses behind a token that is not known"
        assert not any(row.draft for out, _, _ in self.out for row in out.rows), "planned ahead of a verification"
        if any(len(row.new_block_ids) > 1 for row in guessing):
            assert self.scheduler.pool.num_free >= len(self.scheduler.running), "blocks that streams will need"
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots)
        if oldest in decoding and oldest.slot >= 0:
            assert oldest.slot in slots, "the oldest decode did not run"
        if oldest in decoding and self.config.policy == "fcfs":
            assert oldest.slot >= 0, "the first in order was preempted"
        for request in decoding:  # stall-free: a decode runs, or was preempted
            assert request.slot < 0 or request.slot in slots or request not in before
        result = self.runner.execute(plan)
        by_slot = {request.slot: request for request in self.scheduler.running}
        answers = zip((*plan.draws, *plan.rows), (*result.draws, *result.rows), strict=True)
        drawing = {by_slot[item.slot] for item, got in answers if got.token_ids}
        for request in drawing:
            assert not request.params.looks_back or request.num_pending == 1, "drawn without what it depends on"
        self.out.append((plan, result, drawing))
        return True

    def _take(self, chunks):
        for chunk in chunks:
            name = (chunk.request_id, chunk.index)
            assert name not in self.ended, "news after the end"
            self.got[name] += chunk.token_ids
            if chunk.finish_reason:
                self.ended[name] = chunk.finish_reason
            tokens, reason = self.expected[name]
            assert self.got[name] == tokens[: len(self.got[name])]
            if chunk.finish_reason not in (None, "abort", "expired", "error"):
                assert (self.got[name], chunk.finish_reason) == (tokens, reason)

    @invariant()
    def accounted_for(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20000):
            if not self._step():
                break
        assert not self.scheduler.has_work
        assert set(self.ended) == set(self.expected)
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.residency.prefix.num_promised == 0
        assert self.scheduler.num_waiting == 0
        assert self.scheduler.waiting.work == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestScheduler = SchedulerMachine.TestCase
