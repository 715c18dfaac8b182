"""What a server says while its engine starts, starts again, or is gone."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from quire.engine.errors import EngineStartError
from quire.engine.messages import EngineDead, EngineHung, EngineReady, Progress
from quire.engine.outputs import RequestStream

LOADING = Progress("load weights", {"read configuration": 0.25}, 0.5, settled=True)


@pytest.fixture
def slow(fake, monkeypatch):
    """The engine starts when `slow.set()` is called; it has said that it loads. With `fake.broken` it fails then, and
    it does when it is closed."""
    go, start, close = threading.Event(), fake.start, fake.close
    fake.broken = False

    def waiting(on_message):
        on_message(LOADING)
        assert go.wait(60)
        if fake.broken:
            raise EngineStartError("the file ends too early")
        return start(on_message)

    def closing():
        if fake.broken or not go.is_set():
            fake.broken = fake.closed = True
            go.set()
        else:
            close()

    monkeypatch.setattr(fake, "start", waiting)
    monkeypatch.setattr(fake, "close", closing)
    yield go
    go.set()


async def test_the_phases_of_a_start_are_seen_through_an_open_port(serve, slow, eventually):
    async with serve() as http:
        for path in ("/health", "/ready"):
            response = await http.get(path)
            assert (response.status_code, response.json()) == (
                503,
                {"status": "starting", "phase": "load weights", "done": 0.5, "seconds": {"read configuration": 0.25}},
            )
        assert (await http.get("/live")).status_code == 200
        page = (await http.get("/metrics")).text
        assert 'quire_engine_state{state="starting"} 1.0' in page
        assert 'quire_engine_start_progress{phase="load weights"} 0.5' in page
        for response in (
            await http.post("/v1/completions", json={"prompt": "x"}),
            await http.get("/v1/models"),
            await http.get("/version"),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_starting")
            assert int(response.headers["retry-after"]) >= 1
        slow.set()
        while (await http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)
        assert (await http.get("/health")).json() == {"status": "ok"}
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        page = (await http.get("/metrics")).text
        assert 'quire_engine_state{state="serving"} 1.0' in page
        assert 'quire_engine_state{state="starting"} 0.0' in page


async def test_a_start_that_fails_behind_an_open_port_is_the_end(serve, fake, slow, eventually):
    fake.broken = True
    async with serve() as http:
        life = http.app.state.dispatcher.life
        assert not life.over
        slow.set()
        await eventually(lambda: life.over)
        for path in ("/health", "/ready", "/live"):
            response = await http.get(path)
            assert (response.status_code, response.json()) == (503, {"status": "dead"})
    assert fake.closed


async def test_a_server_that_is_stopped_while_its_engine_starts_ends(serve, fake, slow):
    async with serve() as http:
        assert (await http.get("/ready")).status_code == 503
    assert fake.closed
    assert http.app.state.quire is None


async def test_an_engine_that_is_started_again(http, fake, eventually):
    """The client says that another takes the dead one's place; the server waits for it, and counts on."""
    fake.gate.clear()
    dispatcher = http.app.state.quire.dispatcher
    lost = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "x"}))
    await eventually(lambda: len(fake.added) == 1)
    fake.figures = {"steps_total": 5, "requests_total": 1, "running": 1}
    fake.report()
    fake._on_message(EngineDead("killed", "crash", final=False))
    assert (await lost).json()["error"]["code"] == "engine_dead"
    fake._on_message(LOADING)
    await eventually(lambda: dispatcher.life.progress is not None)
    for path in ("/health", "/ready"):
        response = await http.get(path)
        assert (response.status_code, response.json()["status"]) == (503, "restarting")
        assert response.json()["phase"] == "load weights"
    assert (await http.get("/live")).status_code == 200
    refused = await http.post("/v1/completions", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_starting")
    assert refused.headers["x-should-retry"] == "true"
    assert (await http.get("/v1/models")).status_code == 200

    ready = http.app.state.quire.ready
    assert isinstance(ready, EngineReady)
    fake._on_message(ready)
    fake.figures = {"steps_total": 2, "requests_total": 0, "running": 0}
    fake.report()
    metrics = http.app.state.quire.metrics
    await eventually(lambda: metrics.stats.steps_total == 7)
    assert (metrics.stats.running, metrics.stats.requests_total) == (0, 1)
    assert (await http.get("/ready")).status_code == 200
    fake.gate.set()
    assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
    assert http.app.state.quire.admission.predicted_wait() == 0
    page = (await http.get("/metrics")).text
    assert 'quire_engine_restarts_total{reason="crash"} 1.0' in page
    assert 'quire_engine_restarts_total{reason="hang"} 0.0' in page


async def test_hangs_are_counted(http, fake, eventually):
    fake._on_message(EngineHung(11.0))
    await eventually(lambda: http.app.state.dispatcher.life.hangs == 1)
    assert "quire_engine_hung_total 1.0" in (await http.get("/metrics")).text


async def test_the_age_of_the_last_sign_of_life_is_told_while_there_is_an_engine(http, fake):
    fake.age = 1.5
    assert "\nquire_engine_heartbeat_age_seconds 1.5" in (await http.get("/metrics")).text
    fake.age = math.inf
    assert "\nquire_engine_heartbeat_age_seconds " not in (await http.get("/metrics")).text


@pytest.mark.parametrize("stage", ["tokenize", "detokenize"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_on_the_side_of_text_ends_one_request(http, fake, events, monkeypatch, stage, stream):
    """Another stream beside it notices nothing, and the place of the one that failed is free again."""
    state = http.app.state.quire
    if stage == "tokenize":
        encode = state.text.tokenizer.encode
        monkeypatch.setattr(state.text.tokenizer, "encode", raising_for(encode, lambda text: text == "bad"))
    else:
        answer, fold = fake.answer, RequestStream.fold
        fake.answer = lambda request, index: [0] * 9 if request.prompt_ids == [*b"bad"] else answer(request, index)
        monkeypatch.setattr(RequestStream, "fold", raising_for(fold, lambda one, chunk: 0 in chunk.token_ids))
    bad = {"prompt": "bad", "stream": stream}
    other, answer = await asyncio.gather(
        http.post("/v1/completions", json={"prompt": "good", "stream": True}), http.post("/v1/completions", json=bad)
    )
    assert "".join(event["choices"][0]["text"] for event in events(other.text)) == "Hello, world!"
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert (state.admission.open, state.admission.requests) == (0, 0)


async def test_a_stream_that_cannot_go_on_says_so(http, fake, events, monkeypatch):
    fold = RequestStream.fold
    monkeypatch.setattr(RequestStream, "fold", raising_for(fold, lambda one, chunk: ord("w") in chunk.token_ids))
    answer = await http.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert answer.status_code == 200
    assert events(answer.text)[-1]["error"]["code"] == "internal_error"


def raising_for(call, names_it):
    def faulty(*arguments, **named):
        if names_it(*arguments):
            raise MemoryError("planned")
        return call(*arguments, **named)

    return faulty
