"""What clients of such servers count on, point by point: one test for each, named after it.

Each is the shortest statement of its point; the files beside this one go into the details. The engine is a real one on
a tiny model wherever the point is about what it computes, and scripted where it is about the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from process.conftest import Server

from quire.server.app import create_app
from quire.server.config import ServerConfig

EOS = 256
PATHS = ("/v1/completions", "/v1/chat/completions")
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BODY = {"prompt": "Hi", **CHAT}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}


@pytest.fixture
def live(tiny_model: Path, tmp_path: Path) -> Iterator[Any]:
    """`live(*options)`: a server in processes of its own, which is ready."""
    servers: list[Server] = []

    def start(*options: str) -> Server:
        servers.append(Server(tiny_model, tmp_path / f"server{len(servers)}.log", *options))
        return servers[-1].wait_until_ready()

    yield start
    for server in servers:
        for pid in server.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()


async def ask(http, path="/v1/completions", status=200, **body):
    response = await http.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def error_of(response):
    assert response.status_code >= 400, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return error


def samples_of(text):
    """{metric with labels: value}"""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


async def test_01_models_are_not_there_before_the_load(fake):
    """Nor a wrong answer: the caller is told when to come again."""
    app = create_app(fake, ServerConfig())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
        for path in ("/v1/models", "/v1/models/tiny"):
            response = await client.get(path)
            assert response.status_code == 503
            assert error_of(response)["code"] == "engine_starting"
            assert int(response.headers["Retry-After"]) >= 1


async def test_01_models_are_listed_and_shown(http):
    (model,) = (await http.get("/v1/models")).json()["data"]
    assert model["id"] == "tiny"
    assert model["max_model_len"] == 512
    assert (await http.get("/v1/models/tiny")).json() == model
    assert error_of(await http.get("/v1/models/nobody"))["code"] == "model_not_found"


@pytest.mark.parametrize("path", PATHS)
async def test_02_unknown_fields_are_ignored(http, path):
    await ask(http, path, **BODY, brand_new={"a": [1]}, another=None)


@pytest.mark.parametrize("path", PATHS)
async def test_03_null_is_the_default_of_every_optional_field(http, fake, path):
    from quire.server.protocol import ChatBody, CompletionBody

    model = CompletionBody if path == PATHS[0] else ChatBody
    fields = dict.fromkeys(model.model_fields) | {"user": None, "suffix": None, "metadata": None}
    answer = await ask(http, path, **(fields | BODY))
    assert answer["choices"][0]["finish_reason"] == "stop"
    await ask(http, path, **BODY)
    with_nulls, plain = (request.params for request in fake.added)
    assert (with_nulls.temperature, with_nulls.top_k, with_nulls.max_tokens) == (
        plain.temperature,
        plain.top_k,
        plain.max_tokens,
    )


async def test_04_a_stop_string_in_pieces_never_leaks(stream, fake):
    text = "one two STOP three"
    for per_step in range(1, 6):
        fake.tokens_per_step = per_step
        fake.answer = lambda request, index: [*text.encode(), EOS]
        events = await stream(PATHS[0], prompt="x", max_tokens=50, stop="STOP")
        assert "".join(event["choices"][0]["text"] for event in events) == "one two "
        assert not any("S" in event["choices"][0]["text"] for event in events)
        assert events[-1]["choices"][0]["stop_reason"] == "STOP"


@pytest.mark.parametrize("path", PATHS)
async def test_05_usage_comes_last_and_without_choices(stream, path):
    *body, last = await stream(path, **BODY, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert all(event["usage"] is None and event["choices"] for event in body)


@pytest.mark.parametrize("path", PATHS)
async def test_06_continuous_usage_never_falls(stream, path):
    events = await stream(path, **BODY, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 14


@pytest.mark.parametrize("path", PATHS)
async def test_07_done_comes_after_an_error_too(http, fake, events, eventually, path):
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.005
    running = asyncio.ensure_future(http.post(path, json={**BODY, "max_tokens": 400, "stream": True}))
    await eventually(lambda: http.app.state.quire.metrics.stats.generated_tokens_total > 3)
    fake.fail_request = "broken"
    assert set(events((await running).text)[-1]) == {"error"}  # `events` checks the [DONE]


@pytest.mark.parametrize("path", PATHS)
async def test_08_one_finish_reason_for_each_choice(stream, path):
    events = await stream(path, **BODY, n=3, temperature=1.0)
    ends = [choice["index"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


async def test_09_echoed_logprobs_are_the_teacher_forced_ones(running):
    """Of ids: those of the drawn tokens are found again when their text is sent as the prompt."""
    async with running() as http:
        prompt = [5, 70, 200, 31]
        drawn = await ask(
            http, prompt=prompt, max_tokens=6, temperature=0, logprobs=1, ignore_eos=True, return_token_ids=True
        )
        ids = prompt + drawn["choices"][0]["token_ids"]
        again = await ask(http, prompt=[ids, ids], max_tokens=1, temperature=0, logprobs=1, echo=True)
    expected = drawn["choices"][0]["logprobs"]["token_logprobs"]
    for choice in again["choices"]:
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["token_logprobs"][len(prompt) : -1] == pytest.approx(expected, abs=1e-4)
        greedy = [
            max(top.values()) == own
            for top, own in zip(found["top_logprobs"], found["token_logprobs"], strict=True)
            if top
        ]
        assert all(greedy[len(prompt) - 1 : -1])


async def test_10_choices_are_in_the_order_of_prompts_and_samples(http, fake):
    fake.answer = lambda request, index: [*bytes(request.prompt_ids), *str(index).encode(), EOS]
    answer = await ask(http, prompt=["a", "b"], n=2, temperature=1.0)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]


async def test_11_a_seed_gives_the_same_text_alone_and_under_load(running):
    async with running() as http:
        body = {"prompt": "abc", "max_tokens": 12, "temperature": 1.0, "seed": 7, "ignore_eos": True}
        alone = (await ask(http, **body))["choices"][0]["text"]
        assert (await ask(http, **body))["choices"][0]["text"] == alone
        crowd = [asyncio.ensure_future(ask(http, **(body | {"seed": i, "prompt": "abc" * i}))) for i in range(1, 7)]
        assert (await ask(http, **body))["choices"][0]["text"] == alone
        texts = {(await one)["choices"][0]["text"] for one in crowd}
    assert len(texts) > 1


HERMES = '<tool_call>\n{"name": "f", "arguments": {"x": "é}"}}\n</tool_call>'


@pytest.mark.parametrize("text", ["plain é text", f"Well. {HERMES}", f"{HERMES}\n{HERMES}", "<think>why</think>so"])
@pytest.mark.parametrize("per_step", [1, 2, 3, 5, 8, 100])
async def test_12_a_stream_is_the_whole_answer_for_text_tools_and_thinking(serve, events, fake, text, per_step):
    fake.answer = lambda request, index: [*text.encode(), EOS]
    fake.tokens_per_step = per_step
    fake.facts = {"max_model_len": 4096}  # the tools are a part of the prompt
    body = {**CHAT, "tools": [TOOL], "max_tokens": 300}
    async with serve(tool_call_parser="hermes", reasoning_parser="qwen3") as http:
        (whole,) = (await ask(http, PATHS[1], **body))["choices"]
        streamed = events((await http.post(PATHS[1], json={**body, "stream": True})).text)
    content, thoughts, calls, ends = "", "", {}, []
    for choice in (event["choices"][0] for event in streamed):
        content += choice["delta"].get("content") or ""
        thoughts += choice["delta"].get("reasoning") or ""
        for part in choice["delta"].get("tool_calls", ()):
            call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
            call["name"] += part["function"].get("name") or ""
            call["arguments"] += part["function"].get("arguments") or ""
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    message = whole["message"]
    assert content == (message["content"] or "")
    assert thoughts == (message.get("reasoning") or "")
    assert list(calls.values()) == [call["function"] for call in message.get("tool_calls", ())]
    assert ends == [whole["finish_reason"]]
    assert len(calls) == text.count("</tool_call>")
    assert bool(thoughts) == ("<think>" in text)


# One for each construct that schemas of real use are made of.
CLOSED = {"additionalProperties": False}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", "yy"]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"const": None}, {"type": "boolean"}]},
    {
        "type": "object",
        "properties": {"k": {"$ref": "#/$defs/pair"}},
        "required": ["k"],
        "additionalProperties": False,
        "$defs": {
            "pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": 5}], "minItems": 2, "maxItems": 2}
        },
    },
    {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]$"},
    {"type": "string", "format": "date"},
    {"type": "integer", "minimum": -7, "maximum": 12},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"type": ["null", "boolean"]},
    {"oneOf": [{"const": "a"}, {"type": "object", "properties": {"t": {"const": 1}}, "required": ["t"]} | CLOSED]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "properties": {"kind": {"enum": ["x", 1, None]}, "n": {"type": "null"}}, "required": ["n"]}
    | CLOSED,
    {
        "$ref": "#/definitions/tree",
        "definitions": {
            "tree": {
                "type": "object",
                "properties": {"left": {"anyOf": [{"$ref": "#/definitions/tree"}, {"type": "null"}]}},
            }
            | {"required": ["left"], "additionalProperties": False}
        },
    },
]


@pytest.mark.parametrize(
    ("engine", "settings", "fields"),
    [
        ({}, {}, {}),
        ({"speculative_method": "ngram"}, {}, {}),
        ({}, {"reasoning_parser": "qwen3"}, {"thinking_token_budget": 6}),
    ],
    ids=["plain", "speculation", "thinking"],
)
async def test_13_a_strict_schema_holds_whatever_the_model_would_say(running, engine, settings, fields):
    """A random model: nothing but the grammar makes this JSON."""
    whole = []
    async with running(engine, **settings) as http:
        for schema in SCHEMAS:
            wish = {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}
            body = {**CHAT, "response_format": wish, "max_tokens": 200, "temperature": 1.0, "seed": 3, **fields}
            (choice,) = (await ask(http, PATHS[1], **body))["choices"]
            if choice["finish_reason"] == "stop":
                content = choice["message"]["content"]
                jsonschema_rs.validate(schema, json.loads(content), validate_formats=True)
                whole.append(content)
            else:  # a long text or number, or much white space: a beginning of such a text
                assert choice["finish_reason"] == "length"
    assert len(whole) >= len(SCHEMAS) - 4


async def test_14_the_old_names_of_guided_decoding_are_honoured(running):
    async with running() as http:
        answer = await ask(http, prompt="x", guided_choice=["yes", "no"], temperature=1.0, max_tokens=8)
        assert answer["choices"][0]["text"] in ("yes", "no")
        answer = await ask(http, prompt="x", guided_regex="[0-9]{3}", max_tokens=8)
        assert re.fullmatch("[0-9]{3}", answer["choices"][0]["text"])


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": 2.1}, 400, "temperature"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 2, "temperature": 0}, 400, "n"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"seed": 2**64}, 400, "seed"),
        ({"presence_penalty": 3}, 400, "presence_penalty"),
        ({"frequency_penalty": -3}, 400, "frequency_penalty"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
        ({"top_k": -2}, 400, "top_k"),
        ({"min_p": 1.5}, 400, "min_p"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"min_tokens": 5, "max_tokens": 4}, 400, "min_tokens"),
        ({"bad_words": ["x"] * 129}, 400, "bad_words"),
        ({"allowed_token_ids": []}, 400, "allowed_token_ids"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids"),
        ({"logit_bias": {"one": 1}}, 400, "logit_bias"),
        ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
        ({"priority": 1}, 400, "priority"),
        ({"cache_salt": "x" * 129}, 400, "cache_salt"),
        ({"request_id": "a b"}, 400, "request_id"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"best_of": 2}, 400, "best_of"),
        ({"user": 7, "n": "1"}, 400, "n"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_15_errors_have_one_shape_and_name_the_field(http, fake, path, fields, status, param):
    response = await http.post(path, json={**BODY, **fields})
    assert response.status_code == status
    assert error_of(response)["param"] == param
    assert not fake.added


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"tools": []}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ],
)
async def test_15_errors_of_chat_alone(http, fields, param):
    response = await http.post(PATHS[1], json={**BODY, **fields})
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["x"] * 1025}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [320]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"tools": [TOOL]}, "tools"),
    ],
)
async def test_15_errors_of_completions_alone(http, fields, param):
    response = await http.post(PATHS[0], json={**BODY, **fields})
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("path", PATHS)
async def test_16_a_prompt_that_is_too_long_says_so_in_the_words_that_clients_match(http, path):
    long = {"prompt": "x" * 600, "messages": [{"role": "user", "content": "x" * 600}]}
    error = error_of(await http.post(path, json=long))
    assert error["message"].startswith("This model's maximum context length is 512 tokens. However, ")
    assert error["code"] == "context_length_exceeded"


async def test_17_a_client_that_leaves_frees_its_memory(running, eventually):
    async with running() as http:
        state = http.app.state.quire
        body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True}
        request = asyncio.ensure_future(http.post(PATHS[0], json=body))
        await eventually(lambda: state.metrics.stats.kv_blocks_used > 0, 60)
        request.cancel()
        await eventually(lambda: state.metrics.stats.kv_blocks_used == 0, 60)
        text = (await http.get("/metrics")).text
    assert re.search(r"^quire_requests_aborted_total\{.*\} 1\.0$", text, re.MULTILINE)


async def test_18_a_full_house_says_when_to_come_again(serve, fake, eventually):
    fake.gate.clear()
    async with serve(max_queued_requests=0) as http:
        inside = [asyncio.ensure_future(http.post(PATHS[0], json={"prompt": "x"})) for _ in range(4)]
        await eventually(lambda: len(fake.added) == 4)
        response = await http.post(PATHS[0], json={"prompt": "x"})
        assert response.status_code in (429, 503)
        assert int(response.headers["Retry-After"]) >= 1
        assert len(fake.added) == 4
        fake.gate.set()
        await asyncio.gather(*inside)


def test_19_a_drain_ends_the_streams_and_then_the_process(live):
    server = live()
    body = {"prompt": "abc", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.status("/ready") in (503, None), 60)
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0


async def test_20_what_endpoint_pickers_read_is_there_before_any_load(http):
    found = samples_of((await http.get("/metrics")).text)
    names = {name.split("{")[0] for name in found}
    assert {"quire_num_requests_running", "quire_num_requests_waiting", "quire_kv_cache_usage_perc"} <= names
    assert any(name.startswith("quire_cache_config_info{") and "block_size" in name for name in found)


async def test_21_dashboards_find_vllms_names(serve):
    async with serve(vllm_metrics=True) as http:
        await ask(http, prompt="x")
        text = (await http.get("/metrics")).text
    wanted = (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"),
        *("generation_tokens_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
        *("e2e_request_latency_seconds_bucket", "prefix_cache_queries_total", "prefix_cache_hits_total"),
        "request_success_total",
    )
    for name in wanted:
        assert re.search(rf"^vllm:{name}\{{", text, re.MULTILINE), name


async def test_22_a_trace_goes_on_in_here(http):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from quire.server.tracing import Tracer

    exporter = InMemorySpanExporter()
    tracer = http.app.state.tracer = Tracer(exporter, "tiny")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    await http.post(PATHS[0], json={"prompt": "x"}, headers={"traceparent": f"00-{trace}-{parent}-01"})
    tracer._provider.force_flush()
    (span,) = exporter.get_finished_spans()
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, parent)


async def test_23_a_wrong_key_is_told_in_the_usual_shape(serve):
    async with serve(api_key=("right",)) as http:
        for path in ("/v1/models", "/v1/completions", "/tokenize", "/load", "/server_info", "/v1/decisions"):
            method = "GET" if path in ("/v1/models", "/load", "/server_info") else "POST"
            response = await http.request(method, path, headers={"Authorization": "Bearer wrong"})
            assert response.status_code == 401, path
            assert error_of(response)["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_24_adapters_are_refused_by_name(http):
    """There are none here: a model of that name is not found, and the routes that would load one do not exist."""
    assert error_of(await http.post(PATHS[0], json={"prompt": "x", "model": "my-adapter"}))["param"] == "model"
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        response = await http.post(path, json={"lora_name": "a", "lora_path": "/tmp/a"})
        assert response.status_code == 404
        assert error_of(response)["code"] == "not_found"


async def test_25_silence_is_filled_with_comments_that_clients_skip(serve, fake, events):
    fake.gate.clear()
    async with serve(keep_alive_interval=0.02) as http:
        asyncio.get_running_loop().call_later(0.2, fake.gate.set)
        text = (await http.post(PATHS[0], json={"prompt": "x", "stream": True})).text
    assert text.startswith(": keep-alive\n\n")
    assert "".join(event["choices"][0]["text"] for event in events(text)) == "Hello, world!"


async def test_26_anthropics_tokens_are_counted(http):
    body = {"model": "tiny", **CHAT}
    counted = (await http.post("/v1/messages/count_tokens", json=body)).json()
    message = (await http.post("/v1/messages", json={**body, "max_tokens": 5})).json()
    assert counted == {"input_tokens": message["usage"]["input_tokens"]}


async def test_27_counters_are_the_sum_of_all_usages_those_of_the_aborted_included(http, fake, events, eventually):
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.002
    whole = await ask(http, prompt="four", max_tokens=9)
    body = {"prompt": "fifth", "max_tokens": 400, "stream": True, "request_id": "x"}
    options = {"stream_options": {"include_usage": True}}
    running = asyncio.ensure_future(http.post(PATHS[0], json=body | options))
    await eventually(lambda: http.app.state.quire.metrics.stats.generated_tokens_total > 15)
    await ask(http, "/abort_requests", request_ids=["x"])
    aborted = events((await running).text)[-1]
    usages = [whole["usage"], aborted["usage"]]
    found = samples_of((await http.get("/metrics")).text)
    for counter, field in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
        total = found[f'quire_{counter}_tokens_total{{model_name="tiny"}}']
        assert total == sum(usage[field] for usage in usages)
    assert 0 < aborted["usage"]["completion_tokens"] < 400


COMMANDS = (
    "quire --version",
    "quire serve --help",
    "quire bench serve --help",
    "quire doctor --help",
    "quire plan --help",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_28_what_people_type_first_works(command):
    """The one-liners of the clients themselves are in `make test-clients`: they need those clients."""
    _, *words = shlex.split(command)
    run = [sys.executable, "-P", "-m", "quire.server.cli", *words]
    done = subprocess.run(
        run, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_list_has_no_gaps():
    numbers = {int(name[5:7]) for name in globals() if re.match(r"test_\d\d_", name)}
    assert numbers == set(range(1, 29))
