"""All Prometheus objects: one registry per server, names as vLLM's with the prefix `quire_`.

Two kinds: what the API side counts as it happens (latencies, tokens, ends, errors), and what the engine reports in
every StepStats, which is only kept and turned into families when somebody scrapes.

Token counters and the responses' `usage` are fed by the same numbers at the same place (`generate.py`), so the sum over
all usages, those of aborted requests included, equals the counters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ..engine.messages import EngineReady, StepStats
from .keys import OTHER_TENANTS
from .tally import TallyCounter, TallyHistogram

CONTENT_TYPE = CONTENT_TYPE_LATEST

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series per series that says when it began: nobody reads it

MAX_TENANT_SERIES = 2000  # names: a full keys file, and another one in its place while the server runs

# vLLM's bucket sets, so that recorded queries keep their meaning, extended downwards: a small model's first token takes
# less than their first bucket, and 1 to 8 ms is where its inter-token latency lives.
TTFT_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0,
    50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
# Fibonacci's numbers: of a factor, small differences matter while it is small.
CONTENTION_BUCKETS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 50.0, 100.0)
# From what a busy loop takes for a turn to what a probe's patience is.
LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

# What dashboards, KEDA recipes and gateway endpoint pickers ask for under vLLM's names.
ALIASED = frozenset(
    {
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info", "prompt_tokens",
        "prompt_tokens_cached", "generation_tokens", "request_success", "num_preemptions", "prefix_cache_queries",
        "prefix_cache_hits", "admission_rejections", "time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total", "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos",
    }
)  # fmt: skip


class Metrics:
    """The instruments, as attributes; a method where one event moves several."""

    def __init__(
        self, ready: EngineReady, model_name: str, *, tenants: Collection[str] = (), vllm_aliases: bool = False
    ) -> None:
        """`tenants`: those with a name. Without any there are no series by tenant: the names are the callers' then, and
        series are not theirs to make.
        """
        self._registry = CollectorRegistry()
        self._vllm_aliases = vllm_aliases
        self._model = model_name
        self.stats = StepStats(kv_blocks_total=ready.num_blocks)
        sizes = _one_two_five(ready.max_model_len)

        self.time_to_first_token = TallyHistogram(
            "quire_time_to_first_token_seconds",
            "From arrival to a sample's first token.",
            *("model_name", model_name),
            TTFT_BUCKETS,
        )
        self.inter_token_latency = TallyHistogram(
            "quire_inter_token_latency_seconds",
            "Between two deliveries of tokens of one sample.",
            *("model_name", model_name),
            ITL_BUCKETS,
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "A sample's mean time per token after its first.", ITL_BUCKETS
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to a sample's end.", REQUEST_BUCKETS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From arrival at the engine to the first step.", REQUEST_BUCKETS
        )
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", sizes)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Tokens of a sample.", sizes)
        self.contention_factor = TallyHistogram(
            "quire_contention_factor",
            "A finished sample's time over the predicted one of a sample alone in the engine, with an empty cache.",
            *("model_name", model_name),
            CONTENTION_BUCKETS,
        )
        self.step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens in one step of the engine.", STEP_TOKEN_BUCKETS
        )
        self.loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late the API process's event loop is, looked at all the time.", LAG_BUCKETS
        )

        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, as in the responses' usage.")
        self.cached_tokens = self._counter("prompt_tokens_cached", "Prompt tokens that the prefix cache held.")
        self.generation_tokens = TallyCounter(
            "quire_generation_tokens", "Tokens drawn, as in the responses' usage.", "model_name", model_name
        )
        self.useful_tokens = self._counter("step_tokens_useful", "Tokens of the engine's steps.")
        self.launched_tokens = self._counter("step_tokens_launched", "The same, filled up to whole tiles.")
        self.predicted_seconds = self._counter("step_seconds_predicted", "Time of the steps as predicted before each.")
        self.draft_seconds = self._counter(
            "spec_decode_seconds", "Time of guessing, a part of the steps' forward time."
        )
        self._finished = self._family("request_success", "Samples that ended, by finish reason.", "finished_reason")
        self._aborted = self._family("requests_aborted", "Requests whose client left, by stage.", "stage")
        self._expired = self._family("requests_expired", "Requests that ran out of time, by the limit.", "reason")
        self._tenants = set(tenants)
        self._by_tenant = bool(tenants)
        self._promises = self._family(
            "slo",
            "Samples with a promise, by whether it was kept; itl: the 99th percentile of its gaps, or the longest of "
            "fewer than 100.",
            *("slo", "met"),
            *(("tenant",) if self._by_tenant else ()),
        )
        if self._by_tenant:
            self._tenant_requests = self._family("tenant_requests", "Requests that were let in and ended.", "tenant")
            self._tenant_tokens = self._family(
                "tenant_tokens", "Tokens of those: prompt (with cached ones), cached, generation.", "tenant", "kind"
            )
            self._tenant_refusals = self._family(
                "tenant_refusals", "Requests that quotas or admission refused.", "tenant", "reason"
            )
        self._errors = self._family("request_errors", "Answers that are errors.", "code", "reason")
        self._rejected = self._family("admission_rejections", "Requests that were not let in.", "reason")
        for family, ways in (
            (self._aborted, (("waiting",), ("running",))),
            (self._expired, (("timeout",), ("deadline",), ("unreachable",))),
            (self._rejected, (("server_overloaded",), ("tenant_overloaded",), ("rate_limit_exceeded",))),
            (self._errors, (("500", "internal_error"), ("500", "engine_error"))),
        ):
            for way in ways:
                family.labels(model_name, *way)  # there from the start: of a series that is new, no rate sees the first
        self._steps = self._family("step_seconds", "Time in the engine's steps, by part.", "part")
        self.schedule_seconds = self._steps.labels(model_name, "schedule")
        self.forward_seconds = self._steps.labels(model_name, "forward")
        self._http = Counter(
            "quire_http_requests", "HTTP requests.", ("method", "handler", "status"), registry=self._registry
        )
        self._http_seconds = Histogram(
            "quire_http_request_duration_seconds",
            "HTTP requests, headers to last byte.",
            ("method", "handler"),
            buckets=REQUEST_BUCKETS,
            registry=self._registry,
        )
        tallies = (
            self.time_to_first_token,
            self.inter_token_latency,
            self.contention_factor,
            self.generation_tokens,
        )
        for collector in (*tallies, _EngineCollector(self, ready, model_name)):
            self._registry.register(collector)
        ProcessCollector(registry=self._registry)

    def saw_step(self, stats: StepStats) -> None:
        if stats.steps_total != self.stats.steps_total:  # not a mere report of an abort
            self.step_tokens.observe(stats.step_tokens)
            self.useful_tokens.inc(stats.step_tokens)
            self.launched_tokens.inc(stats.launched_tokens)
            self.predicted_seconds.inc(stats.predicted_seconds)
            self.schedule_seconds.inc(stats.schedule_seconds)
            self.forward_seconds.inc(stats.forward_seconds)
            self.draft_seconds.inc(stats.draft_seconds)
        self.stats = stats

    def sample_finished(
        self, reason: str, *, tokens: int, total_seconds: float, decode_seconds: float, ideal_seconds: float
    ) -> None:
        """`ideal_seconds`: 0 where nothing predicts them."""
        self._finished.labels(self._model, reason).inc()
        self.e2e_latency.observe(total_seconds)
        self.request_generation_tokens.observe(tokens)
        if tokens > 1:
            self.time_per_output_token.observe(decode_seconds / (tokens - 1))
        if ideal_seconds > 0:
            self.contention_factor.observe(total_seconds / ideal_seconds)

    def expired(self, reason: str) -> None:
        """`reason` as in Chunk.error: "timeout", "deadline", "unreachable"."""
        self._expired.labels(self._model, reason).inc()

    def promise(self, slo: str, met: bool, tenant: str, count: int) -> None:
        """`count` samples were promised `slo`: "ttft", "itl", "deadline"."""
        whose = (self._label(tenant),) if self._by_tenant else ()
        for kept in (True, False):  # both from the first on: a share of none is 0, not nothing
            self._promises.labels(self._model, slo, str(kept).lower(), *whose).inc(count if kept == met else 0)

    def name_tenants(self, tenants: Iterable[str]) -> None:
        """These have names from now on; more than so many in the life of a server count as others."""
        for tenant in tenants:
            if len(self._tenants) < MAX_TENANT_SERIES:
                self._tenants.add(tenant)

    def tenant_used(self, tenant: str, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        """A request has ended, after so many tokens."""
        if self._by_tenant:
            whose = self._label(tenant)
            self._tenant_requests.labels(self._model, whose).inc()
            counts = {"prompt": prompt_tokens, "cached": cached_tokens, "generation": completion_tokens}
            for kind, count in counts.items():
                self._tenant_tokens.labels(self._model, whose, kind).inc(count)

    def tenant_refused(self, tenant: str, reason: str) -> None:
        if self._by_tenant:
            self._tenant_refusals.labels(self._model, self._label(tenant), reason).inc()

    def _label(self, tenant: str) -> str:
        return tenant if tenant in self._tenants else OTHER_TENANTS

    def aborted(self, stage: str) -> None:
        """`stage`: "waiting" (no token yet) or "running"."""
        self._aborted.labels(self._model, stage).inc()

    def error(self, status: int, reason: str) -> None:
        self._errors.labels(self._model, str(status), reason).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._model, reason).inc()

    def http(self, method: str, handler: str, status: int, seconds: float) -> None:
        self._http.labels(method, handler, str(status)).inc()
        self._http_seconds.labels(method, handler).observe(seconds)

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        text = generate_latest(self._registry)
        return text + generate_latest(_Aliases(self._registry)) if self._vllm_aliases else text

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"quire_{name}", text, ("model_name",), buckets=buckets, registry=self._registry)
        return family.labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"quire_{name}", text, ("model_name",), registry=self._registry).labels(self._model)

    def _family(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"quire_{name}", text, ("model_name", *labels), registry=self._registry)


class _EngineCollector(Collector):
    """The engine's last StepStats and its facts from the start, as families."""

    def __init__(self, metrics: Metrics, ready: EngineReady, model_name: str) -> None:
        self._metrics = metrics
        self._ready = ready
        self._model = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._metrics.stats
        gauges = {
            "num_requests_running": ("Samples in the running batch.", stats.running),
            "num_requests_waiting": ("Samples that wait for a place in it.", stats.waiting),
            "kv_cache_usage_perc": ("Share of KV blocks held by requests, 0 to 1.", _ratio(stats)),
            "queue_seconds_predicted": ("Predicted wait of a request that came now.", stats.queue_seconds),
            "step_time_error_ratio": ("Mean relative error of the predicted step time.", stats.step_time_error),
            "kv_blocks_cached": ("Free KV blocks that a prompt could still hit.", stats.kv_blocks_cached),
        }
        for name, (text, value) in gauges.items():
            yield self._gauge(name, text, {(): value})
        counters = {
            "num_preemptions": ("Running samples put back to waiting.", stats.preemptions_total),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens_total),
            "prefix_cache_hits": ("Prompt tokens found there.", stats.prefix_hit_tokens_total),
            "engine_steps": ("Steps of the engine.", stats.steps_total),
            "engine_prompt_tokens": ("Prompt tokens computed, recomputed ones included.", stats.prompt_tokens_total),
            "engine_generated_tokens": ("Tokens drawn by the engine.", stats.generated_tokens_total),
            "recomputed_tokens": ("Tokens computed again after a preemption.", stats.recomputed_tokens_total),
            "evicted_blocks": ("Cached KV blocks handed out for something else.", stats.evicted_blocks_total),
            "engine_expired": ("Samples that ran out of time, waiting or running.", stats.expired_total),
            "engine_aborted": ("Samples ended from outside.", stats.aborted_total),
            "engine_failed": ("Samples ended by an error of their own.", stats.failed_total),
            "engine_nan_logits": ("Of these, by logits that were not numbers.", stats.nan_total),
            "discarded_tokens": ("Tokens drawn for samples that had just ended.", stats.discarded_tokens_total),
            "graph_steps": ("Forward passes that replayed a CUDA graph.", stats.graph_steps_total),
            "eager_steps": ("Forward passes launched kernel by kernel.", stats.eager_steps_total),
        }
        for name, (text, value) in counters.items():
            yield self._counter(name, text, {(): value})
        if self._ready.speculative_tree:
            yield from self._speculation(stats)
        ready = self._ready
        facts = {"block_size": str(ready.block_size), "num_gpu_blocks": str(ready.num_blocks)}
        yield self._gauge("cache_config_info", "Shape of the KV cache.", {tuple(facts.values()): 1}, *facts)
        phases: dict[tuple[str, ...], float] = {(phase,): seconds for phase, seconds in ready.startup_seconds.items()}
        yield self._gauge("startup_seconds", "Time to start, by phase.", phases, "phase")
        memory: dict[tuple[str, ...], float] = {(kind,): size for kind, size in ready.memory_bytes.items()}
        yield self._gauge("memory_bytes", "Memory held, by kind.", memory, "kind")

    def _speculation(self, stats: StepStats) -> Iterator[Metric]:
        """What was guessed and what came of it. Positions count from 0, as vLLM's do."""
        depth = self._ready.num_speculative_tokens
        drafted, accepted = (_padded(by, depth) for by in (stats.drafted_by_position, stats.accepted_by_position))
        counters = {
            "num_drafts": ("Times that tokens were guessed behind a sample.", drafted[0]),
            "num_draft_tokens": ("Tokens guessed and verified.", stats.draft_tokens_total),
            "num_accepted_tokens": ("Tokens guessed and drawn.", stats.accepted_tokens_total),
            "num_wasted_tokens": ("Tokens guessed in vain.", stats.draft_tokens_total - stats.accepted_tokens_total),
            "failures": ("Times that a proposer failed a sample, which went on without.", stats.draft_failures_total),
        }
        for name, (text, value) in counters.items():
            yield self._counter(f"spec_decode_{name}", text, {(): value})
        positions = {
            "num_drafts_per_pos": ("Drafts with a token at this position.", drafted),
            "num_accepted_tokens_per_pos": ("Of these, those of which it was accepted.", accepted),
        }
        for name, (text, values) in positions.items():
            by_position: dict[tuple[str, ...], float] = {(str(k),): value for k, value in enumerate(values)}
            yield self._counter(f"spec_decode_{name}", text, by_position, "position")
        yield self._gauge(
            "spec_decode_acceptance_length",
            "Tokens that a draft's verification gave on average, its own included: 1 = all was guessed in vain.",
            {(): 1 + stats.accepted_tokens_total / drafted[0] if drafted[0] else 1.0},
        )
        yield self._depths(_padded(stats.draft_depths, depth + 1))

    def _depths(self, counts: list[int]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(
            "quire_spec_decode_depth",
            "How many tokens were to be guessed one after another; 0 = guessing would not have paid.",
            labels=("model_name",),
        )
        buckets = [(str(float(depth)), total) for depth, total in enumerate(accumulate(counts))]
        everything = sum(depth * count for depth, count in enumerate(counts))
        family.add_metric((self._model,), [*buckets, ("+Inf", sum(counts))], everything)
        return family

    def _counter(
        self, name: str, text: str, values: Mapping[tuple[str, ...], float], *labels: str
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(f"quire_{name}", text, labels=("model_name", *labels))
        for key, value in values.items():
            family.add_metric((self._model, *key), value)
        return family

    def _gauge(self, name: str, text: str, values: Mapping[tuple[str, ...], float], *labels: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"quire_{name}", text, labels=("model_name", *labels))
        for key, value in values.items():
            family.add_metric((self._model, *key), value)
        return family


class _Aliases(CollectorRegistry):
    """The same numbers under the names that vLLM gave them."""

    def __init__(self, source: CollectorRegistry) -> None:
        super().__init__()
        self._source = source

    def collect(self) -> Iterable[Metric]:
        for family in self._source.collect():
            if family.name.removeprefix("quire_") in ALIASED:
                alias = Metric(family.name.replace("quire_", "vllm:", 1), family.documentation, family.type)
                alias.samples = [
                    sample._replace(
                        name=sample.name.replace("quire_", "vllm:", 1), labels={**sample.labels, "engine": "0"}
                    )
                    for sample in family.samples
                ]
                yield alias


def _padded(counts: list[int], length: int) -> list[int]:
    """With zeros for what has not happened yet, so that the series are the same from the start."""
    return counts + [0] * (length - len(counts))


def _ratio(stats: StepStats) -> float:
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0


def _one_two_five(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 … up to `largest`."""
    series = [float(m * 10**e) for e in range(len(str(largest))) for m in (1, 2, 5)]
    return tuple(value for value in series if value <= largest)
