"""Limits and promises of one request: what the engine is told, and what the caller is told when time runs out."""

from __future__ import annotations

import asyncio
import time

import pytest

from quire.server import generate

PATHS = ["/v1/completions", "/v1/chat/completions"]
PROMPT = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}


def error_of(response, status, code):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == "timeout_error"
    return error["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_they_reach_the_engine_in_seconds(http, fake, path):
    before = time.monotonic()
    body = {"slo": {"ttft_ms": 500, "itl_ms": 50.5, "deadline_ms": 20_000}, "timeout": 30, "tenant": "alice"}
    assert (await http.post(path, json={**PROMPT, **body})).status_code == 200
    (request,) = fake.added
    assert (request.slo.ttft, request.slo.itl, request.slo.deadline) == (0.5, 0.0505, 20)
    assert (request.timeout, request.tenant) == (30, "alice")
    assert before <= request.arrival <= time.monotonic()


async def test_unset_means_none_and_the_servers_own_limit(serve, fake):
    async with serve(request_timeout=7) as http:
        for body in ({}, {"slo": None, "timeout": None, "tenant": None}, {"slo": {"ttft_ms": None}}, {"timeout": 8}):
            await http.post("/v1/completions", json={**PROMPT, **body})
        await http.post("/v1/completions", json={**PROMPT, "timeout": 6})
    assert [request.timeout for request in fake.added] == [7, 7, 7, 7, 6]
    assert {(request.slo.ttft, request.slo.itl, request.slo.deadline) for request in fake.added} == {(None,) * 3}
    assert {request.tenant for request in fake.added} == {""}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ({"timeout": 0.05}, "request_timeout", "`timeout` = 0.05 s has passed"),
        ({"slo": {"deadline_ms": 50}}, "deadline_exceeded", "`slo.deadline_ms` = 50 has passed"),
        ({"slo": {"deadline_ms": 50}, "timeout": 5}, "deadline_exceeded", "`slo.deadline_ms` = 50 has passed"),
        ({}, "request_timeout", "This server's limit of 0.1 s for a request has passed"),
    ],
)
async def test_out_of_time_in_the_queue_is_a_plain_504(serve, fake, path, stream, body, code, says):
    fake.gate.clear()
    async with serve(request_timeout=0.1) as http:
        response = await http.post(path, json={**PROMPT, **body, "stream": stream})
        message = error_of(response, 504, code)
        metrics = (await http.get("/metrics")).text
        assert http.app.state.quire.admission.open == 0
        assert http.app.state.quire.dispatcher._mailboxes == {}
    assert message == f"{says}. It was waiting, no token drawn."
    assert response.headers["x-should-retry"] == "false", "clients would have it computed again"
    reason = "timeout" if code == "request_timeout" else "deadline"
    assert f'quire_requests_expired_total{{model_name="tiny",reason="{reason}"}} 1.0' in metrics
    assert f'quire_request_errors_total{{code="504",model_name="tiny",reason="{code}"}} 1.0' in metrics
    assert 'quire_prompt_tokens_total{model_name="tiny"} 0.0' in metrics, "it was never computed"
    assert fake.aborted == [], "the engine knows"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_deadline_that_cannot_be_met_is_said_at_once(http, fake, stream):
    fake.gate.clear()
    fake.unreachable = True
    body = {**PROMPT, "slo": {"deadline_ms": 3_600_000}, "stream": stream}
    message = error_of(await http.post("/v1/completions", json=body), 504, "deadline_unreachable")
    assert message.startswith("`slo.deadline_ms` = 3.6e+06 cannot be met any more")
    assert "no token drawn" in message


async def test_out_of_time_while_running_says_how_far_it_came(http, fake):
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.01
    body = {**PROMPT, "timeout": 0.2, "max_tokens": 400}
    message = error_of(await http.post("/v1/completions", json=body), 504, "request_timeout")
    drawn = int(
        (await http.get("/metrics")).text.split('quire_generation_tokens_total{model_name="tiny"} ')[1].split(".")[0]
    )
    assert drawn > 0
    assert message.endswith(f"It was running, {drawn} tokens drawn.")


async def test_out_of_time_in_a_stream_ends_it_with_an_event_after_all_that_was_drawn(http, fake, events):
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.01
    body = {**PROMPT, "slo": {"deadline_ms": 200}, "max_tokens": 400, "n": 2, "stream": True}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200
    *tokens, last = events(response.text)
    assert last["error"]["code"] == "deadline_exceeded"
    shown = sum(len(event["choices"][0]["text"]) for event in tokens)
    assert f"{shown} tokens drawn" in last["error"]["message"]
    assert all(event["choices"][0]["finish_reason"] is None for event in tokens)


async def test_an_engine_that_does_not_answer_meets_a_wall(serve, fake, eventually, monkeypatch):
    monkeypatch.setattr(generate, "WALL_SECONDS", 0.1)
    fake.gate.clear()
    fake.expires = False
    async with serve() as http:
        for stream in (True, False):
            body = {**PROMPT, "timeout": 0.05, "stream": stream, "slo": {"deadline_ms": 10, "itl_ms": 5}}
            error_of(await http.post("/v1/completions", json=body), 504, "request_timeout")
        await eventually(lambda: len(fake.aborted) == 2)
        metrics = (await http.get("/metrics")).text
    assert 'quire_requests_expired_total{model_name="tiny",reason="timeout"} 2.0' in metrics
    assert 'quire_slo_total{met="false",model_name="tiny",slo="deadline"} 2.0' in metrics


async def test_promises_are_counted_for_every_sample(serve, fake):
    fake.answer = lambda request, index: [97] * (5 if index else 40)
    fake.step_seconds = 0.01
    async with serve() as http:
        body = {**PROMPT, "n": 3, "max_tokens": 40}
        await http.post("/v1/completions", json={**body, "slo": {"ttft_ms": 60_000, "itl_ms": 1, "deadline_ms": 150}})
        await http.post("/v1/completions", json=body)
        metrics = (await http.get("/metrics")).text
    for slo, met, count in (
        ("ttft", "true", 3),
        ("itl", "false", 3),
        ("deadline", "true", 2),
        ("deadline", "false", 1),
    ):
        assert f'quire_slo_total{{met="{met}",model_name="tiny",slo="{slo}"}} {count}.0' in metrics, (slo, met)
    assert "tenant=" not in metrics


async def test_promises_are_counted_per_tenant_only_where_tenants_are_known(serve, fake):
    fake.facts = {"tenants": ["a", "b"], "scheduling_policy": "fair"}
    async with serve() as http:
        await http.post("/v1/completions", json={**PROMPT, "slo": {"ttft_ms": 60_000}, "tenant": "b"})
        metrics = (await http.get("/metrics")).text
    assert 'quire_slo_total{met="true",model_name="tiny",slo="ttft",tenant="b"} 1.0' in metrics
    assert 'quire_slo_total{met="false",model_name="tiny",slo="ttft",tenant="b"} 0.0' in metrics


async def test_known_tenants_must_be_named(serve, fake):
    fake.facts = {"tenants": ["a", "b"], "scheduling_policy": "fair", "tenant_weights": {"a": 1.0, "b": 3.0}}
    async with serve() as http:
        for path in PATHS:
            for tenant, says in ((None, "`tenant` is required"), ("c", "tenant 'c' is not known here")):
                response = await http.post(path, json={**PROMPT, "tenant": tenant})
                assert response.status_code == 400
                assert response.json()["error"]["param"] == "tenant"
                assert says in response.json()["error"]["message"]
            assert (await http.post(path, json={**PROMPT, "tenant": "b"})).status_code == 200
        version = (await http.get("/version")).json()
    assert not {"tenants", "tenant_weights"} & set(version), "they are nobody's business"
    assert {request.tenant for request in fake.added} == {"b"}


async def test_a_keys_tenant_is_a_digest_and_a_body_may_not_say_otherwise(serve, fake):
    async with serve(api_key=("right", "other")) as http:
        for key, tenant in (("right", None), ("right", None), ("other", None), ("right", "me")):
            headers = {"Authorization": f"Bearer {key}"}
            response = await http.post("/v1/completions", json={**PROMPT, "tenant": tenant}, headers=headers)
        assert response.status_code == 403
        error = response.json()["error"]
        assert (error["code"], error["param"], error["type"]) == ("tenant_not_allowed", "tenant", "permission_error")
        first, second, other = (request.tenant for request in fake.added)
        own = await http.post("/v1/completions", json={**PROMPT, "tenant": other}, headers=headers)
        assert own.status_code == 403, "another key's"
        own = await http.post("/v1/completions", json={**PROMPT, "tenant": first}, headers=headers)
        assert own.status_code == 200
    assert first == second != other
    assert len(first) == 12
    assert "right" not in first


async def test_a_keys_own_digest_can_be_a_known_tenant(serve, fake):
    import hashlib

    digest = hashlib.sha256(b"right").hexdigest()[:12]
    fake.facts = {"tenants": [digest], "scheduling_policy": "fair"}
    async with serve(api_key=("right", "other")) as http:
        for key, status in (("right", 200), ("other", 400)):
            response = await http.post("/v1/completions", json=PROMPT, headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == status, key


@pytest.mark.parametrize("policy", ["fcfs", "fair", "deadline", "priority"])
async def test_priority_only_under_its_policy(serve, fake, policy):
    fake.facts = {"scheduling_policy": policy}
    async with serve() as http:
        assert (await http.post("/v1/completions", json={**PROMPT, "priority": 0})).status_code == 200
        response = await http.post("/v1/completions", json={**PROMPT, "priority": -3})
    if policy == "priority":
        assert fake.added[-1].priority == -3
    else:
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "priority"
        assert policy in response.json()["error"]["message"]


async def test_a_refusal_of_fields_costs_nothing(serve, fake):
    """Before admission and before tokenizing: the house is full, and the answer is still 400."""
    async with serve(max_queued_requests=0) as http:
        state = http.app.state.quire
        slots = [state.admission.admit(4)]
        for body in ({"slo": {"ttft_ms": -1}}, {"timeout": 0}, {"priority": 1}, {"n": 0}, {"tenant": ""}):
            assert (await http.post("/v1/completions", json={**PROMPT, **body})).status_code == 400
        assert (await http.post("/v1/completions", json=PROMPT)).status_code == 503
        slots[0].release()
        await asyncio.sleep(0)
