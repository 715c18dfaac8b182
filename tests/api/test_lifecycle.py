"""Admission, drain, a dead engine, a hung engine, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import re

import pytest


def completion(http, **body):
    return asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "x", **body}))


def assert_retryable(response, code):
    assert response.status_code == 503
    assert response.json()["error"]["code"] == code
    assert 1 <= int(response.headers["retry-after"]) <= 5
    assert response.headers["x-should-retry"] == "true"


async def test_a_full_house_refuses_at_once_and_takes_again_later(serve, fake, eventually):
    fake.gate.clear()
    async with serve(max_queued_requests=2) as http:  # the engine runs 4
        inside = [completion(http, n=3, stream=stream) for stream in (True, False)]
        await eventually(lambda: len(fake.added) == 2)
        assert_retryable(await completion(http), "server_overloaded")
        assert_retryable(await completion(http, stream=True), "server_overloaded")
        assert (await http.get("/ready")).status_code == 200
        fake.gate.set()
        assert [response.status_code for response in await asyncio.gather(*inside)] == [200, 200]
        assert (await completion(http)).status_code == 200
        metrics = (await http.get("/metrics")).text
    assert 'quire_admission_rejections_total{model_name="tiny",reason="server_overloaded"} 2.0' in metrics


async def test_a_refused_request_leaves_no_trace(http, fake):
    state = http.app.state.quire
    for body in ({"prompt": [9999]}, {"prompt": "x" * 600}, {"temperature": 9}):
        assert (await completion(http, **body)).status_code == 400
    assert (state.admission.open, state.admission.requests) == (0, 0)
    assert fake.added == []


async def test_places_come_back_after_every_kind_of_end(http, fake, eventually):
    state = http.app.state.quire
    await asyncio.gather(
        *(completion(http, stream=i % 2 == 0, n=1 + i % 3, stop="wor" if i % 5 else None) for i in range(20))
    )
    fake.fail_request = "planned"
    await asyncio.gather(*(completion(http, stream=i % 2 == 0) for i in range(4)))
    assert (state.admission.open, state.admission.requests) == (0, 0)
    assert state.dispatcher._mailboxes == {}


async def test_a_dead_engine_ends_streams_and_refuses(http, fake, events, eventually):
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.005
    metrics = http.app.state.quire.metrics
    streams = [completion(http, stream=True, max_tokens=400) for _ in range(3)]
    await eventually(lambda: fake.running == 3)
    before = metrics.stats.steps_total
    await eventually(lambda: metrics.stats.steps_total > before + 1)
    fake.gate.clear()
    unbegun = [completion(http, stream=stream) for stream in (True, False)]
    await eventually(lambda: len(fake.added) == 5)
    fake.die()
    for stream in streams:
        error = events((await stream).text)[-1]["error"]
        assert error["code"] == "engine_dead"
        assert "/secret" not in json.dumps(error)
    for request in unbegun:
        assert_retryable(await request, "engine_dead")
    assert_retryable(await completion(http), "engine_dead")
    for path in ("/health", "/ready"):
        response = await http.get(path)
        assert (response.status_code, response.json()) == (503, {"status": "dead"})
    assert (await http.get("/v1/models")).status_code == 200


async def test_a_hung_engine_is_unhealthy_until_it_moves(http, fake):
    fake.age = 60.0
    for path in ("/health", "/ready"):
        response = await http.get(path)
        assert (response.status_code, response.json()) == (503, {"status": "hung"})
    assert_retryable(await completion(http), "engine_dead")
    fake.age = 0.1
    assert (await http.get("/health")).status_code == 200
    assert (await completion(http)).status_code == 200


async def test_a_drain_finishes_what_runs_and_lets_nobody_in(http, fake, events, eventually):
    state = http.app.state.quire
    fake.gate.clear()
    running = completion(http, stream=True)
    await eventually(lambda: len(fake.added) == 1)
    drain = asyncio.ensure_future(state.admission.drain(5))
    await asyncio.sleep(0)
    assert (await http.get("/ready")).json() == {"status": "draining"}
    assert (await http.get("/health")).status_code == 200
    assert_retryable(await completion(http), "server_draining")
    fake.gate.set()
    assert events((await running).text)[-1]["choices"][0]["finish_reason"] == "stop"
    assert await drain


async def test_a_drain_gives_up_in_time(http, fake, eventually):
    state = http.app.state.quire
    fake.gate.clear()
    running = completion(http, stream=True)
    await eventually(lambda: len(fake.added) == 1)
    assert not await state.admission.drain(0.01)
    from quire.server import errors

    state.dispatcher.fail_all(errors.draining())
    assert_retryable(await running, "server_draining")
    await eventually(lambda: len(fake.aborted) == 1)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_client_that_leaves_is_aborted(http, fake, eventually, stream, begun):
    state = http.app.state.quire
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.005
    if not begun:
        fake.gate.clear()
    disconnected = asyncio.Event()
    sent: list[bytes] = []
    request_sent = False

    async def receive():
        nonlocal request_sent
        if not request_sent:
            request_sent = True
            body = {"prompt": ["x", "y"], "n": 2, "max_tokens": 400, "stream": stream}
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    call = asyncio.ensure_future(http.app(scope, receive, send))
    await eventually(lambda: len(fake.added) == 2 and (not begun or fake.running == 4))
    if begun:
        await asyncio.sleep(0.05)
    disconnected.set()
    await asyncio.wait_for(call, 5)
    await eventually(lambda: sorted(fake.aborted) == sorted(r.request_id for r in fake.added))
    assert (state.admission.open, state.admission.requests) == (0, 0)
    assert state.dispatcher._mailboxes == {}
    await eventually(lambda: fake.running == 0)
    metrics = (await http.get("/metrics")).text
    assert re.search(r"^quire_requests_aborted_total\{.*\} 1\.0$", metrics, re.MULTILINE)


async def test_ids_of_callers_are_labels_only(http, fake):
    responses = await asyncio.gather(
        *(http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "same"}) for _ in range(20))
    )
    assert {response.json()["id"] for response in responses} == {"cmpl-same"}
    assert {response.headers["x-request-id"] for response in responses} == {"same"}
    assert len({request.request_id for request in fake.added}) == 20
    assert not any("same" in request.request_id for request in fake.added)


@pytest.mark.parametrize("bad", ["a b", "x" * 65, "é", "<script>", "a/b", ""])
async def test_harmful_ids_are_replaced(http, bad):
    response = await http.get("/health", headers={"X-Request-Id": bad.encode()})
    assert response.headers["x-request-id"] != bad
    assert response.headers["x-request-id"].isalnum()


async def test_a_failed_start_raises_and_closes(folder, tmp_path):
    from quire.engine.errors import EngineStartError
    from quire.server.app import create_app
    from quire.server.config import ServerConfig

    class Broken:
        closed = False

        def start(self, on_message):
            raise EngineStartError("no such model")

        def close(self):
            self.closed = True

    client = Broken()
    app = create_app(client, ServerConfig())
    with pytest.raises(EngineStartError):
        async with app.router.lifespan_context(app):
            pass
    assert client.closed
