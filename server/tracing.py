"""OpenTelemetry: one span for each request that asked the model something, written when the request is over.

While a request runs nothing is done for its span but to note three times; so tracing costs where a request ends, and
nothing at all is imported or noted without `--otlp-traces-endpoint`. The attributes have the names of OpenTelemetry's
conventions for generative AI, and beside them the older ones that inference servers have. No span holds what a caller
wrote or a model answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..engine.errors import EngineStartError
from .generate import Generation

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

# The routes that have spans, and what they do in OpenTelemetry's words.
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/decisions": "decide",
}
EXPORT_SECONDS = 5  # for one batch of spans, and for the last one when the server stops


class Tracer:
    """Makes spans; a thread of the library's own sends them in batches, and drops them where nobody takes them."""

    def __init__(self, exporter: SpanExporter, model: str) -> None:
        """`model`: the name under which it is served."""
        from opentelemetry import trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = Resource({"service.name": "quire", "service.version": __version__})
        self._provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("quire", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace
        self._model = model

    def record(self, route: str | None, headers: Mapping[str, str], notes: Mapping[str, Any], status: int) -> None:
        """The request at `route` has been answered with `status`, just now.

        headers  of the request: `traceparent` is the span's parent
        notes    what is known of it: `arrival`, `request_id`; `body` if it was read, `generation` if it was let in, and
                 `error`, the code that it was refused with
        """
        operation = OPERATIONS.get(route or "")
        if operation is None:
            return
        epoch = time.time() - time.monotonic()

        def nanoseconds(moment: float) -> int:
            return int((epoch + moment) * 1e9)

        now, arrival = time.monotonic(), notes["arrival"]
        generation: Generation | None = notes.get("generation")
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._propagator.extract(headers),
            kind=self._trace.SpanKind.SERVER,
            start_time=nanoseconds(arrival),
            attributes=_asked(operation, self._model, notes),
        )
        error = notes.get("error")
        if generation is not None:
            span.set_attributes(_told(generation, self._model, arrival, now))
            for event, moment in _phases(generation, arrival):
                span.add_event(event, timestamp=nanoseconds(moment))
            error = error or generation.error_code
        span.set_attribute("http.response.status_code", status)
        if error is not None or status >= 500:
            span.set_attribute("error.type", error or str(status))
            if status >= 500 or generation is not None:
                span.set_status(self._trace.StatusCode.ERROR)
        span.end(nanoseconds(now))

    def close(self) -> None:
        """Send what is left, within EXPORT_SECONDS."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(EXPORT_SECONDS)


def open_tracer(endpoint: str, model: str) -> Tracer:
    """Spans go to `endpoint` by OTLP over HTTP. Raises EngineStartError where the library is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise EngineStartError(
            "--otlp-traces-endpoint needs OpenTelemetry, which is not installed: pip install 'quire[otel]'"
        ) from None
    return Tracer(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS), model)


def _asked(operation: str, model: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    body = notes.get("body")
    found = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": getattr(body, "model", None) or model,
        "gen_ai.request.id": getattr(body, "request_id", None) or notes["request_id"],
        "gen_ai.request.stream": getattr(body, "stream", None),
        "gen_ai.conversation.id": getattr(body, "session_id", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _told(generation: Generation, model: str, arrival: float, now: float) -> dict[str, Any]:
    params, usage = generation.request.prompts[0].params, generation.usage
    phases = dict(_phases(generation, arrival))
    prefill, decode = phases.get("prefill"), phases.get("decode")
    found = {
        "gen_ai.request.n": params.n,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.seed": params.seed,
        "gen_ai.response.id": generation.label,
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": generation.finish_reasons,
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cached_tokens": usage.cached_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
        "gen_ai.latency.e2e": now - arrival,
        "gen_ai.latency.time_in_queue": None if prefill is None else prefill - arrival,
        "gen_ai.latency.time_to_first_token": None if decode is None else decode - arrival,
        "gen_ai.response.time_to_first_chunk": None if decode is None else decode - arrival,
        "gen_ai.latency.time_in_model_prefill": None if decode is None or prefill is None else decode - prefill,
        "gen_ai.latency.time_in_model_decode": None if decode is None else now - decode,
        "gen_ai.latency.time_in_model_inference": None if prefill is None else now - prefill,
    }
    return {name: value for name, value in found.items() if value is not None}


def _phases(generation: Generation, arrival: float) -> list[tuple[str, float]]:
    """When each phase of the request began that did: the queue, its first step, its first token."""
    moments = (("queue", arrival), ("prefill", generation.prefill_at), ("decode", generation.decode_at))
    return [(phase, moment) for phase, moment in moments if moment is not None]
