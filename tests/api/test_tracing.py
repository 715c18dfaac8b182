"""Spans: one a request, with its phases, its figures and its parent; nothing where tracing is off."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from quire.server.config import ServerConfig
from quire.server.tracing import Tracer

CHAT = {"messages": [{"role": "user", "content": "a secret question"}]}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def traced(serve):
    """(client, function that gives the spans so far)"""
    exporter = InMemorySpanExporter()
    async with serve() as http:
        tracer = http.app.state.tracer = Tracer(exporter, "tiny")

        def spans():
            tracer._provider.force_flush()
            return exporter.get_finished_spans()

        yield http, spans


@pytest.mark.parametrize("stream", [False, True])
async def test_a_span_of_a_request(traced, fake, stream):
    http, spans = traced
    fake.num_cached = 4
    body = CHAT | {"stream": stream, "max_tokens": 5, "temperature": 0.5, "top_k": 3, "seed": 7, "session_id": "s1"}
    response = await http.post(
        "/v1/chat/completions", json=body, headers={"traceparent": PARENT, "X-Request-Id": "mine"}
    )
    assert response.status_code == 200
    (span,) = spans()
    assert span.name == "chat tiny"
    assert span.kind.name == "SERVER"
    assert f"{span.context.trace_id:032x}" == PARENT[3:35]
    assert f"{span.parent.span_id:016x}" == PARENT[36:52]
    assert [event.name for event in span.events] == ["queue", "prefill", "decode"]
    moments = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert moments == sorted(moments)
    assert moments[0] == moments[1]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.id": "mine",
        "gen_ai.request.n": 1,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": stream,
        "gen_ai.conversation.id": "s1",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.completion_tokens": 5,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "http.response.status_code": 200,
    }
    found = dict(span.attributes)
    assert {name: found.get(name) for name in expected} == expected
    assert found["gen_ai.usage.input_tokens"] == found["gen_ai.usage.prompt_tokens"] > 0
    parts = [found[f"gen_ai.latency.time_in_{part}"] for part in ("queue", "model_prefill", "model_decode")]
    assert sum(parts) == pytest.approx(found["gen_ai.latency.e2e"])
    assert "secret" not in str(found)
    assert span.status.status_code is StatusCode.UNSET


async def test_refused_and_failed_requests_have_spans_too(traced, fake):
    http, spans = traced
    await http.post("/v1/completions", json={"prompt": "x", "temperature": 9})
    fake.fail_request = "broken"
    await http.post("/v1/completions", json={"prompt": "x", "stream": True})
    refused, failed = spans()
    assert refused.attributes["error.type"] == "invalid_value"
    assert refused.attributes["http.response.status_code"] == 400
    assert refused.status.status_code is StatusCode.UNSET  # the caller's fault
    assert not refused.events
    assert failed.attributes["error.type"] == "engine_error"
    assert failed.status.status_code is StatusCode.ERROR


async def test_other_routes_have_none(traced):
    http, spans = traced
    for path in ("/health", "/v1/models", "/metrics", "/nowhere"):
        await http.get(path)
    await http.post("/tokenize", json={"prompt": "x"})
    assert not spans()


async def test_a_mangled_parent_is_no_parent(traced):
    http, spans = traced
    await http.post("/v1/completions", json={"prompt": "x"}, headers={"traceparent": "00-zz-1"})
    assert spans()[0].parent is None


def test_nothing_of_it_is_imported_where_it_is_off():
    """FastAPI may import OpenTelemetry's interface by itself; what works behind it is ours alone."""
    code = (
        "import sys, quire.server.app\n"
        "sys.exit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://x", ""])
def test_an_endpoint_that_is_none(endpoint):
    with pytest.raises(ValueError, match="otlp_traces_endpoint"):
        ServerConfig(otlp_traces_endpoint=endpoint)


async def test_a_collector_that_is_not_there_disturbs_nobody(serve):
    async with serve(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces") as http:
        response = await http.post("/v1/completions", json={"prompt": "x"})
        assert response.status_code == 200
