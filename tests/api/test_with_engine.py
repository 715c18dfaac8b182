"""The HTTP side over a real engine on a tiny model: limits, promises and many samples, end to end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Running = Callable[..., Any]


def post(http: httpx.AsyncClient, **body: Any) -> asyncio.Future[httpx.Response]:
    fields = {"prompt": "abc", "max_tokens": 8, "ignore_eos": True, **body}
    return asyncio.ensure_future(http.post("/v1/completions", json=fields))


def metric(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.split("{")[0] == name)


async def test_out_of_time_ends_in_the_engine_and_leaves_nothing_there(running, eventually):
    async with running() as http:
        state = http.app.state.quire
        late = [
            post(http, max_tokens=400, n=20, timeout=0.02),
            post(http, max_tokens=400, n=20, slo={"deadline_ms": 20}),
            post(http, max_tokens=400, n=20, slo={"deadline_ms": 20}, stream=True),
        ]
        good = post(http, slo={"ttft_ms": 60_000, "itl_ms": 60_000, "deadline_ms": 60_000})
        answers = [await request for request in late]
        assert [answer.json()["error"]["code"] for answer in answers[:2]] == ["request_timeout", "deadline_exceeded"]
        assert '"code":"deadline_exceeded"' in answers[2].text
        assert (await good).json()["choices"][0]["finish_reason"] == "length"
        await eventually(lambda: state.metrics.stats.running + state.metrics.stats.waiting == 0, 30)
        await eventually(lambda: state.metrics.stats.kv_blocks_used == 0, 30)
        text = (await http.get("/metrics")).text
    assert metric(text, "quire_requests_expired_total") == 3
    assert metric(text, "quire_engine_expired_total") > 0
    assert 'quire_slo_total{met="true",model_name="tiny",slo="deadline"} 1.0' in text
    assert 'quire_slo_total{met="false",model_name="tiny",slo="deadline"} 40.0' in text
    assert (state.admission.open, state.admission.requests) == (0, 0)


async def test_a_deadline_that_the_engine_cannot_meet_is_refused_before_the_work(running):
    async with running({"scheduling_policy": "deadline"}) as http:
        state = http.app.state.quire
        crowd = [post(http, max_tokens=300, n=8) for _ in range(3)]
        await asyncio.sleep(0.2)
        response = await post(http, prompt=[7] * 400, max_tokens=1, slo={"deadline_ms": 1})
        assert response.status_code == 504
        assert response.json()["error"]["code"] in ("deadline_unreachable", "deadline_exceeded")
        assert "no token drawn" in response.json()["error"]["message"]
        for request in crowd:
            assert (await request).status_code == 200
        assert state.admission.open == 0


async def test_every_request_that_was_sent_is_seen_in_the_figures(running, eventually):
    async with running(max_queue_seconds=3600) as http:
        state = http.app.state.quire
        bodies = [{"prompt": ["a", "bc"]}, {"n": 3}, {"prompt": "x" * 100, "logprobs": 2}, {"stream": True}] * 3
        answers = [await request for request in [post(http, **body) for body in bodies]]
        assert {answer.status_code for answer in answers} == {200}
        await eventually(lambda: state.metrics.stats.requests_total == state.dispatcher.requests_sent == 15, 30)
        await eventually(lambda: state.admission.predicted_wait() == state.metrics.stats.queue_seconds, 30)
        assert not state.admission._unseen
        assert not state.admission._in_flight


async def test_many_samples_through_few_places(running):
    async with running({"max_n": 10_000}) as http:
        answer = (await post(http, n=1000, max_tokens=2, temperature=1.5, seed=7)).json()
        again = (await post(http, n=3, max_tokens=2, temperature=1.5, seed=7)).json()
        text = (await http.get("/metrics")).text
    assert [choice["index"] for choice in answer["choices"]] == list(range(1000))
    assert answer["usage"] == {**answer["usage"], "prompt_tokens": 3, "completion_tokens": 2000}
    assert len({choice["text"] for choice in answer["choices"]}) > 10
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in answer["choices"][:3]]
    assert metric(text, "quire_generation_tokens_total") == 2006
    assert metric(text, "quire_contention_factor_count") == 1003


async def test_tenants_are_served_and_counted(running):
    engine = {"scheduling_policy": "fair", "tenant_weights": {"a": 1.0, "b": 2.0}}
    async with running(engine) as http:
        requests = [post(http, tenant=tenant, slo={"ttft_ms": 60_000}) for tenant in "ab" * 4]
        assert {(await request).status_code for request in requests} == {200}
        assert (await post(http)).status_code == 400
        assert (await post(http, tenant="c")).status_code == 400
        assert (await post(http, tenant="a", priority=1)).status_code == 400
        text = (await http.get("/metrics")).text
    for tenant in "ab":
        assert f'quire_slo_total{{met="true",model_name="tiny",slo="ttft",tenant="{tenant}"}} 4.0' in text


async def test_caches_are_not_shared_between_keys(running, tmp_path):
    """CVE-2025-46570: what another tenant has asked is neither found in the cache nor told by `cached_tokens`."""
    names = ("alice", "bob", "gate")
    entries = [{"name": name, "sha256": hashlib.sha256(f"key-of-{name}".encode()).hexdigest()} for name in names]
    entries[2]["scopes"] = ["infer", "tenant"]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(entries))
    prefix = list(range(1, 129))  # eight blocks

    async def cached(http: httpx.AsyncClient, who: str, **body: Any) -> int:
        fields = {"prompt": prefix, "max_tokens": 1, **body}
        answer = await http.post("/v1/completions", json=fields, headers={"Authorization": f"Bearer {who}"})
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    async with running(api_keys_file=path, api_key=("plain", "second")) as http:
        callers = ("key-of-alice", "key-of-bob", "plain", "second")
        assert [await cached(http, who) for who in callers] == [0, 0, 0, 0]
        assert [await cached(http, who) for who in callers] == [112] * 4, "their own they find: the control"
        assert await cached(http, "key-of-bob", cache_salt="mine") == 0
        assert await cached(http, "key-of-gate", tenant="stranger") == 0
        assert await cached(http, "key-of-gate", tenant="alice") == 112, "a gateway that speaks for her"


async def test_what_the_engine_resolved_of_speculation_bounds_what_may_be_asked(running):
    engine = {"speculative_method": "ngram", "speculative_tree": "rsd-c:2,1", "speculative_adaptive": False}
    async with running(engine) as http:
        facts = (await http.get("/version")).json()
        answers = [
            await post(http, prompt=[5, 6, 7], max_tokens=4, temperature=0, speculative=wish)
            for wish in (None, {"method": "none"}, {"num_tokens": 2}, {"num_tokens": 3}, {"method": "draft"})
        ]
    assert facts["speculative_method"] == "ngram"
    assert (facts["speculative_tree"], facts["num_speculative_tokens"]) == ("rsd-c:2,1", 2)
    assert facts["speculative_adaptive"] is False
    assert facts["reasons"]["draft_shape"] == "given"
    assert [answer.status_code for answer in answers] == [200, 200, 200, 400, 400]
    assert len({answer.json()["choices"][0]["text"] for answer in answers[:3]}) == 1


async def test_structured_output_whole_and_streamed_beside_free_requests(running):
    """Each spelling, n samples, logprobs, stop strings; what is not constrained says what it says alone."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["open", "close"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
    strict = {"type": "json_schema", "json_schema": {"name": "call", "strict": True, "schema": schema}}
    compact = {"json": schema, "disable_any_whitespace": True}
    async with running(engine={"model": "bundled", "num_blocks": 256}) as http:
        ask = {"prompt": "def main():", "ignore_eos": False, "max_tokens": 400, "seed": 1, "logprobs": 1}
        free = (await post(http, **ask, temperature=0)).json()["choices"][0]["text"]
        answers = await asyncio.gather(
            post(http, **ask, response_format=strict, n=2),
            post(http, **ask, structured_outputs=compact, n=2),
            post(http, **ask, guided_regex="[a-f]{2}-[0-9]{3}", n=2),
            post(http, **ask, guided_choice=["yes", "no"]),
            post(http, **ask, temperature=0),
            post(http, **ask, structured_outputs={"regex": "abc,def,.*"}, stop=[",d"]),
        )
        texts = [[choice["text"] for choice in answer.json()["choices"]] for answer in answers]
        for text in texts[0] + texts[1]:
            call = json.loads(text)
            assert call["name"] in ("open", "close")
            assert 0 <= call["count"] <= 99
        assert all(" " not in text for text in texts[1])
        assert all(re.fullmatch("[a-f]{2}-[0-9]{3}", text) for text in texts[2])
        assert texts[3][0] in ("yes", "no")
        assert texts[4] == [free]
        assert texts[5] == ["abc"]
        streamed = await post(http, **ask, structured_outputs=compact, n=2, stream=True)
        pieces = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
        for index in (0, 1):
            choices = [choice for piece in pieces for choice in piece["choices"] if choice["index"] == index]
            assert "".join(choice["text"] for choice in choices) == texts[1][index]
            assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]


@pytest.mark.parametrize("syntax", ["auto", "qwen3_coder", "pythonic"])
async def test_calls_that_have_to_be_made_are_made(running, syntax):
    """By a model that has never seen a tool: whole and streamed, several samples, one function named."""
    schema = {
        "type": "object",
        "properties": {"mode": {"enum": ["r", "w"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["mode", "count"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("open", "close")]
    named = {"type": "function", "function": {"name": "close"}}
    ask = {"messages": [{"role": "user", "content": "open it"}], "tools": tools, "max_tokens": 150, "seed": 1, "n": 2}
    async with running(engine={"model": "bundled", "num_blocks": 256}, tool_call_parser=syntax) as http:
        for extra in ({"tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": named}):
            whole = (await http.post("/v1/chat/completions", json={**ask, **extra})).json()
            streamed = await http.post("/v1/chat/completions", json={**ask, **extra, "stream": True})
            pieces = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
            for choice in whole["choices"]:
                (call,) = choice["message"]["tool_calls"]
                assert choice["message"]["content"] is None
                assert choice["finish_reason"] == ("tool_calls" if "parallel_tool_calls" in extra else "stop")
                assert call["function"]["name"] in (("close",) if extra["tool_choice"] == named else ("open", "close"))
                values = json.loads(call["function"]["arguments"])
                assert values["mode"] in ("r", "w")
                assert 0 <= values["count"] <= 99
                deltas = [c["delta"] for p in pieces for c in p["choices"] if c["index"] == choice["index"]]
                parts = [part["function"]["arguments"] for delta in deltas for part in delta.get("tool_calls", ())]
                assert "".join(parts) == call["function"]["arguments"]


async def test_questions_share_the_computed_input_and_agree_with_the_models_own_probabilities(running):
    questions = [{"type": "predicate", "instructions": f"It is about {topic}."} for topic in ("money", "rain", "cats")]
    async with running() as http:
        body = {"input": "I was charged twice for one subscription. " * 5, "questions": questions}
        answer = (await http.post("/v1/decisions", json=body)).json()
        usage = answer["usage"]
        shared = 5 * len("I was charged twice for one subscription. ") // 16 * 16
        assert usage["input_tokens_details"]["cached_tokens"] >= 2 * shared
        rendered = {"messages": [{"role": "user", "content": f"{body['input']}\n\nIs this true? It is about rain."}]}
        content = rendered["messages"][0]["content"]
        content += "\n\nA. Yes\nB. No\n\nAnswer with the letter of one option and nothing else."
        rendered["messages"][0]["content"] = content
        chat = await http.post(
            "/v1/chat/completions",
            json={**rendered, "max_tokens": 1, "temperature": 0, "logprob_token_ids": [65, 66]},
        )
    top = chat.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    yes, no = (math.exp(one["logprob"]) for one in top)
    assert answer["answers"][1]["probability"] == pytest.approx(yes / (yes + no), abs=1e-4)
