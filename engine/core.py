"""The engine: a plain loop on one thread.

receive() ──▶ add / abort ──▶ schedule() ──▶ runner.launch() ──▶ runner.collect() ──▶ update() ──▶ send(StepOutputs)

With overlap a step is launched before the one before it is collected, so that the device goes on while the host plans.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import NamedTuple

from ..scheduler.config import SchedulerConfig
from ..scheduler.drafting import as_run
from ..scheduler.plan import Chunk, Row, StepPlan
from ..scheduler.roster import Refused
from ..scheduler.scheduler import Scheduler
from .assemble import assemble
from .calibrate import calibrate
from .compiling import Compiling
from .config import EngineConfig
from .errors import EngineStartError, RankLost, RequestError
from .layout import count_parameters
from .messages import Abort, AddRequest, Busy, Down, EngineReady, Shutdown, StepOutputs, StepStats, Up, Watch
from .ranks import Ranks
from .recorded import share_threads
from .resolve import look_at_machine
from .runner import Launched
from .sampler import NAN_LOGITS
from .startup import Startup
from .validation import check_request, limits_of
from .watching import Watching, batch_of

log = logging.getLogger(__name__)

# An idle engine says this often that it turns: the API side's watchdog and gauges live on it.
HEARTBEAT_SECONDS = 1.0
# One that waits for nothing but a grammar looks this often whether anything else has come.
COMPILING_SECONDS = 0.005


class Step(NamedTuple):
    """A step that is out."""

    plan: StepPlan
    launched: Launched
    predicted: float  # seconds
    started: float  # on the clock of perf_counter
    scheduling: float  # seconds


class EngineCore:
    def __init__(self, config: EngineConfig, startup: Startup | None = None) -> None:
        """Load the model and get everything ready to serve, and tell `startup` of it. Raises EngineStartError."""
        self.config = config
        self.announce: Callable[[float], None] = _tell_nobody  # called before a step that is predicted to be a long one
        startup = startup or Startup()
        machine = look_at_machine(config.device)
        self._ranks = Ranks(config, machine)
        try:
            made = assemble(config, machine, self._ranks.meet, startup)
            model, settings, self.runner, self.grammars = made.model, made.settings, made.runner, made.grammars
            with startup.phase("time steps"):
                cost = calibrate(self._rehearse, settings, startup.advance)
        except RankLost as error:
            reason = f"{error}: {self._ranks.last_words()}"
            self._ranks.close()
            raise EngineStartError(reason) from None
        except BaseException:
            self._ranks.close()
            raise
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=settings.num_blocks,
                block_size=settings.block_size,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_num_prefill_tokens=settings.max_num_prefill_tokens,
                max_model_len=settings.max_model_len,
                eos_token_ids=frozenset(model.eos_token_ids),
                prefix_caching=config.prefix_caching,
                cache_context=(str(made.path), settings.quantization, settings.kv_cache_dtype),
                policy=config.scheduling_policy,
                overtaking=config.overtaking,
                tenant_weights=config.tenant_weights,
                slo_itl=config.slo_itl_ms and config.slo_itl_ms / 1e3,
                chunking=config.prefill_chunking,
                eviction=config.prefix_eviction,
                draft_method=settings.draft_method,
                draft_shape=settings.draft_shape,
                adaptive_drafts=config.speculative_adaptive,
            ),
            cost,
        )
        self._threads = settings.threads
        self._ahead = int(settings.overlap)  # steps launched before one is collected
        self._out: deque[Step] = deque()
        self._compiling = Compiling(self.grammars, self._ranks)
        self._watching = Watching()
        self._unplanned: Exception | None = None  # why there is no next step; the scheduler has to start over
        self._collected = 0.0  # when the last step was, on the clock of perf_counter
        self._update_seconds = 0.0
        self.stats = StepStats(kv_blocks_total=settings.num_blocks - 1)
        self.ready = EngineReady(
            model_path=str(made.path),
            model_type=model.model_type,
            num_parameters=count_parameters(model),
            dtype=str(settings.dtype).removeprefix("torch."),
            quantization=settings.quantization,
            kv_cache_dtype=settings.kv_cache_dtype,
            device=str(settings.device),
            vocab_size=model.vocab_size,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_n=config.max_n,
            scheduling_policy=config.scheduling_policy,
            tenants=sorted(config.tenant_weights),
            step_cost=list(cost),
            max_logprobs=config.max_logprobs,
            block_size=settings.block_size,
            num_blocks=settings.num_blocks,
            eos_token_ids=list(model.eos_token_ids),
            kernels=made.kernels.describe(),
            reasons=settings.reasons,
            startup_seconds=startup.seconds,
            memory_bytes=made.memory,
            tenant_weights=dict(config.tenant_weights),
            speculative_method=settings.draft_method,
            speculative_tree=str(settings.draft_shape or ""),
            num_speculative_tokens=settings.draft_shape.depth if settings.draft_shape else 0,
            speculative_adaptive=config.speculative_adaptive,
            tensor_parallel_size=settings.tensor_parallel_size,
        )
        self.limits = limits_of(self.ready)
        for name, reason in settings.reasons.items():
            log.info("%s = %s (%s)", name, str(getattr(settings, name)).removeprefix("torch."), reason)
        log.info("kernels: %s", ", ".join(f"{op}={name}" for op, name in made.kernels.describe().items()))
        log.info("started: %s", ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in startup.seconds.items()))

    def close(self) -> None:
        """End the other ranks, and what would be compiled yet."""
        self._ranks.close()
        self.grammars.close()

    def _rehearse(self, rows: list[Row]) -> None:
        self._ranks.rehearse(rows)
        self.runner.rehearse(rows)

    # ---------------------------------------------------------------- requests and steps

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._out) or len(self._compiling) > 0

    def handle(self, message: AddRequest | Abort | Watch) -> list[Chunk]:
        """Take one message in; what it ends at once is answered by the chunks. Raises RankLost as `step` does."""
        with self._naming_the_lost():
            return self._left(self._handle(message))

    def _handle(self, message: AddRequest | Abort | Watch) -> list[Chunk]:
        if isinstance(message, Watch):
            self._watching.renew(message.seconds)
            return []
        if isinstance(message, Abort):
            return [chunk for request_id in message.request_ids for chunk in self._abort(request_id, message.index)]
        self.stats.requests_total += 1
        return [] if self._compiling.hold(message) else self._take(message)

    def _take(self, message: AddRequest) -> list[Chunk]:
        try:
            # The API side has checked all this; here is the engine's own wall, whatever route the message took.
            check_request(message, self.limits)
            self._add(message)
            return []
        except (RequestError, Refused) as error:
            reason = str(error)
        except Exception as error:
            log.exception("request %s cannot be added", message.request_id)
            reason = f"the request cannot be run: {type(error).__name__}"
        return self._refuse(message, reason)

    def _refuse(self, message: AddRequest, reason: str) -> list[Chunk]:
        self.scheduler.counters.failed += 1
        return [
            Chunk(message.request_id, index, [], finish_reason="error", error=reason)
            for index in range(min(max(message.params.n, 1), self.limits.max_n))
        ]

    def _add(self, message: AddRequest) -> None:
        self.scheduler.add(
            message.request_id,
            message.prompt_ids,
            message.params,
            priority=message.priority,
            arrival=message.arrival,
            cache_salt=message.cache_salt,
            tenant=message.tenant,
            weight=message.weight,
            slo=message.slo,
            timeout=message.timeout,
            speculative=message.speculative,
        )

    def _abort(self, request_id: str, index: int | None) -> list[Chunk]:
        """What cannot be aborted goes on to its own end, unheard: the API side has forgotten it."""
        try:
            return self._end(request_id, index)
        except Exception:
            log.exception("request %s cannot be aborted", request_id)
            return []

    def _end(self, request_id: str, index: int | None) -> list[Chunk]:
        chunks = self._compiling.abort(request_id, index)
        if chunks is None:
            return self.scheduler.abort(request_id, index)
        self.scheduler.counters.aborted += len(chunks)
        return chunks

    def _add_compiled(self) -> list[Chunk]:
        """Take in the requests whose grammars are ready; what ends at once is answered by the chunks."""
        chunks: list[Chunk] = []
        for message, aborted, error in self._compiling.ready():
            chunks += self._take(message) if error is None else self._refuse(message, error)
            chunks += [chunk for index in aborted for chunk in self.scheduler.abort(message.request_id, index)]
        return chunks

    def _expire(self, now: float) -> list[Chunk]:
        """End what has run out of time, wherever it waits or runs."""
        chunks = self._compiling.expire(now)
        self.scheduler.counters.expired += len(chunks)
        return chunks + self.scheduler.expire(now)

    def step(self) -> list[Chunk]:
        """Finish one step over all requests; nothing to do is an empty list. Raises RankLost where a rank has ended."""
        with self._naming_the_lost():
            return self._left(self._step())

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except RankLost as error:
            raise RankLost(f"{error}: {self._ranks.last_words()}") from error

    def _left(self, chunks: list[Chunk]) -> list[Chunk]:
        """The same chunks; the grammars of requests that end with them need not be kept any longer."""
        for chunk in chunks:
            if chunk.finish_reason is not None and chunk.request_id not in self.scheduler.roster.groups:
                self._compiling.release(chunk.request_id)
        return chunks

    def _step(self) -> list[Chunk]:
        share_threads(self.runner.decoder, self._threads)
        self._ranks.check()
        if not self.scheduler.has_work and not self._out:
            self._compiling.wait(COMPILING_SECONDS)
        expired = self._add_compiled() + self._expire(time.monotonic())
        while self._may_launch():
            if not self._launch():
                break
        if self._out:
            return expired + self._collect()
        if self._unplanned is not None:
            error, self._unplanned = self._unplanned, None
            return expired + self.scheduler.start_over(error)
        return expired

    def _may_launch(self) -> bool:
        if self._unplanned is not None or len(self._out) > self._ahead:
            return False
        return not self._out or self.scheduler.may_plan_ahead()

    def _launch(self) -> bool:
        """Plan the next step and set it going; False when there is nothing to run."""
        started = time.perf_counter()
        try:
            plan = self.scheduler.schedule(time.monotonic())
        except Exception as error:
            log.exception("the next step cannot be planned")
            self._unplanned = error
            return False
        if plan is None:
            return False
        predicted = self.scheduler.steps.cost.seconds(self.scheduler.shape)
        scheduled = time.perf_counter()
        self._announce(predicted)
        self._ranks.launch(plan)
        self._out.append(Step(plan, self.runner.launch(plan), predicted, started, scheduled - started))
        return True

    def _collect(self) -> list[Chunk]:
        """Wait for the step that was launched first, and take in what it gave."""
        step = self._out.popleft()
        self._announce(step.predicted)
        result = self.runner.collect(step.launched)
        self._ranks.collect(result)
        now = time.perf_counter()
        # The device began with it when it was launched, or was done with the one before.
        seconds = now - max(step.started, self._collected)
        self._collected = now
        # What a stream feels is the whole cycle: an update that nothing overlaps counts as long as the last one was.
        cycle = seconds if self._out else seconds + self._update_seconds
        accepted = self.scheduler.counters.accepted
        chunks = self.scheduler.update(step.plan, result, cycle)
        self._update_seconds = time.perf_counter() - now
        if self._watching.is_on:
            accepted = self.scheduler.counters.accepted - accepted
            self._watching.saw(batch_of(step.plan, result, accepted, seconds + self._update_seconds))
        if self.config.check:
            self.scheduler.check()
        self.stats.step_tokens = sum(row.num_tokens for row in as_run(step.plan.rows, result.rows))
        self.stats.launched_tokens = self.scheduler.steps.cost.launched(self.stats.step_tokens)
        self.stats.step_seqs = len(step.plan.rows)
        self.stats.predicted_seconds = step.predicted
        self.stats.draft_seconds = sum(done.seconds for done in result.drafting)
        self.stats.forward_seconds = seconds if self._out else seconds - step.scheduling
        self.stats.schedule_seconds = step.scheduling + self._update_seconds
        self.stats.steps_total += 1
        self.stats.nan_total += sum(chunk.error == NAN_LOGITS for chunk in chunks)
        return chunks

    def _announce(self, seconds: float) -> None:
        if seconds > HEARTBEAT_SECONDS:
            self.announce(seconds)

    def outputs(self, chunks: list[Chunk]) -> StepOutputs:
        """The chunks with the figures of now."""
        scheduler, counters, stats = self.scheduler, self.scheduler.counters, self.stats
        stats.running, stats.waiting = len(scheduler.running), scheduler.num_waiting
        stats.step_time_error, stats.step_cost = scheduler.steps.error, scheduler.steps.cost
        stats.queue_seconds = scheduler.wait_seconds()
        stats.kv_blocks_used, stats.kv_blocks_cached = scheduler.pool.num_used, scheduler.pool.num_cached
        stats.prompt_tokens_total = counters.prompt_tokens
        stats.generated_tokens_total = counters.generated_tokens
        stats.prefix_query_tokens_total = counters.prefix_query_tokens
        stats.prefix_hit_tokens_total = counters.prefix_hit_tokens
        stats.preemptions_total = counters.preemptions
        stats.recomputed_tokens_total = counters.recomputed_tokens
        stats.evicted_blocks_total, stats.expired_total = scheduler.pool.num_evicted, counters.expired
        stats.aborted_total, stats.failed_total = counters.aborted, counters.failed
        stats.discarded_tokens_total = counters.discarded
        stats.draft_tokens_total, stats.accepted_tokens_total = counters.drafted, counters.accepted
        stats.draft_failures_total = counters.draft_failures
        stats.drafted_by_position, stats.accepted_by_position = list(counters.drafted_at), list(counters.accepted_at)
        stats.draft_depths = list(counters.depths)
        stats.graph_steps_total, stats.eager_steps_total = self.runner.graph_steps, self.runner.eager_steps
        watching = self._watching
        # The figures are copied: the message lives on, on another thread.
        return StepOutputs(chunks, copy(stats), watching.batch(), watching.holdings(scheduler))


def run(core: EngineCore, receive: Callable[[float], list[Down]], send: Callable[[Up], None]) -> None:
    """Serve until told to shut down. receive(seconds) waits that long at most, and returns what came."""
    core.announce = lambda seconds: send(Busy(seconds))
    while True:
        chunks: list[Chunk] = []
        for message in receive(0.0 if core.has_work else HEARTBEAT_SECONDS):
            if isinstance(message, Shutdown):
                return
            chunks += core.handle(message)
        chunks += core.step()
        send(core.outputs(chunks))


def _tell_nobody(seconds: float) -> None:
    pass
