"""Load, settings, requests ended by name, and requests rendered without being run."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

EOS = 256
HEADER = "endpoint-load-metrics"


def key(name):
    return {"Authorization": f"Bearer {name}"}


async def test_load(http, fake):
    fake.figures = {"running": 3, "waiting": 2, "kv_blocks_used": 25, "kv_blocks_total": 100}
    fake.report()
    await asyncio.sleep(0.05)
    expected = {"kv_cache_usage_perc": 0.25, "num_requests_running": 3, "num_requests_waiting": 2}
    assert (await http.get("/load")).json() == {"server_load": 0, **expected}
    fake.gate.clear()
    running = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "x"}))
    await asyncio.sleep(0.1)
    assert (await http.get("/load")).json()["server_load"] == 1
    fake.gate.set()
    await running


async def test_orca(serve, fake):
    fake.figures = {"running": 1, "waiting": 0, "kv_blocks_used": 50, "kv_blocks_total": 100}
    body = {"prompt": "x"}
    async with serve(api_key=("right",)) as http:
        plain = await http.post("/v1/completions", json=body, headers=key("right"))
        assert HEADER not in plain.headers
        text = await http.post("/v1/completions", json=body, headers=key("right") | {f"{HEADER}-format": "TEXT"})
        assert text.headers[HEADER] == (
            "TEXT named_metrics.kv_cache_usage_perc=0.5, named_metrics.num_requests_running=1, "
            "named_metrics.num_requests_waiting=0"
        )
        stream = body | {"stream": True}
        asked = await http.post("/v1/completions", json=stream, headers=key("right") | {f"{HEADER}-format": "JSON"})
        figures = json.loads(asked.headers[HEADER].removeprefix("JSON "))
        assert figures["named_metrics"]["kv_cache_usage_perc"] == 0.5
        for headers in (key("right") | {f"{HEADER}-format": "BIN"}, key("wrong") | {f"{HEADER}-format": "TEXT"}):
            assert HEADER not in (await http.post("/v1/completions", json=body, headers=headers)).headers


async def test_server_info_tells_settings_and_no_secrets(serve, folder):
    async with serve(max_queued_requests=7) as http:
        response = await http.get("/server_info")
    info = response.json()
    assert info["models"] == ["tiny"]
    assert info["settings"]["max_queued_requests"] == 7
    assert info["engine"]["max_model_len"] == 512
    assert str(folder.parent) not in response.text
    async with serve(api_key=("hush-hush",)) as http:
        response = await http.get("/server_info", headers=key("hush-hush"))
        assert response.status_code == 403  # such a key may ask the model, and no more
        assert "hush-hush" not in response.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_aborted_ends_with_what_was_drawn(http, fake, events, eventually, path, stream):
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.005
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "n": 2, "max_tokens": 400}
    running = asyncio.ensure_future(http.post(path, json={**body, "stream": stream, "request_id": "mine"}))
    state = http.app.state.quire
    await eventually(lambda: state.metrics.stats.generated_tokens_total > 3)
    response = await http.post("/abort_requests", json={"request_ids": ["mine", "nobodys"]})
    assert response.json() == {"aborted": ["mine"]}
    answer = await running
    assert answer.status_code == 200
    choices = [event["choices"][0] for event in events(answer.text)] if stream else answer.json()["choices"]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert ends == ["abort", "abort"]
    await eventually(lambda: fake.running == 0)
    assert len(state.registry) == 0
    assert state.admission.requests == 0
    text = (await http.get("/metrics")).text
    assert 'quire_requests_aborted_total{model_name="tiny",stage="running"} 1.0' in text


async def test_ids_of_answers_and_headers_are_names_too(http, fake, eventually):
    fake.gate.clear()
    by_header = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "a"}))
    await eventually(lambda: len(fake.added) == 1)
    assert (await http.post("/abort_requests", json={"request_ids": ["cmpl-a"]})).json() == {"aborted": ["cmpl-a"]}
    assert (await by_header).json()["choices"][0]["finish_reason"] == "abort"


async def test_nobody_aborts_anothers_request_or_by_a_part_of_its_name(serve, fake, eventually):
    fake.gate.clear()
    async with serve(api_key=("one", "two")) as http:
        body = {"prompt": "x", "request_id": "ab"}
        running = asyncio.ensure_future(http.post("/v1/completions", json=body, headers=key("one")))
        await eventually(lambda: len(fake.added) == 1)
        names = ["ab", "a", "", "*", "cmpl-ab", fake.added[0].request_id]
        for caller, ids in (("two", names), ("one", [name for name in names if "ab" not in name.split("-")])):
            response = await http.post("/abort_requests", json={"request_ids": ids}, headers=key(caller))
            assert response.json() == {"aborted": []}
        assert not fake.aborted
        for wrong in ({}, {"request_ids": []}, {"request_ids": "ab"}, {"request_ids": [1]}):
            assert (await http.post("/abort_requests", json=wrong, headers=key("one"))).status_code == 400
        assert (await http.post("/abort_requests", json={"request_ids": ["ab"]})).status_code == 401
        fake.gate.set()
        assert (await running).json()["choices"][0]["finish_reason"] == "stop"


async def test_an_admin_aborts_anybodys(serve, fake, eventually, tmp_path):
    fake.gate.clear()
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("user", "boss")}
    entries = [{"name": "user", "sha256": digests["user"]}]
    entries += [{"name": "boss", "sha256": digests["boss"], "scopes": ["infer", "admin"]}]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(entries))
    async with serve(api_keys_file=path) as http:
        body = {"prompt": "x", "request_id": "theirs"}
        running = asyncio.ensure_future(http.post("/v1/completions", json=body, headers=key("user")))
        await eventually(lambda: len(fake.added) == 1)
        response = await http.post("/abort_requests", json={"request_ids": ["theirs"]}, headers=key("boss"))
        assert response.json() == {"aborted": ["theirs"]}
        assert (await running).json()["choices"][0]["finish_reason"] == "abort"


async def test_rendered_completions(http, fake):
    body = {"prompt": ["Hi", "you"], "temperature": 0.25, "max_tokens": 3, "truncate_prompt_tokens": 2, "seed": 5}
    response = await http.post("/v1/completions/render", json=body)
    assert [(one["prompt"], one["token_ids"]) for one in response.json()] == [("Hi", [72, 105]), ("ou", [111, 117])]
    params = response.json()[0]["sampling_params"]
    assert (params["temperature"], params["max_tokens"], params["top_k"], params["seed"]) == (0.25, 3, 7, 5)
    assert not fake.added
    assert http.app.state.quire.admission.requests == 0


async def test_a_rendered_chat_is_what_the_model_would_read(http, fake):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    rendered = (await http.post("/v1/chat/completions/render", json=body)).json()
    await http.post("/v1/chat/completions", json=body)
    assert rendered["token_ids"] == fake.added[0].prompt_ids
    assert rendered["prompt"] == "<user>Hi\n<assistant>"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions/render", {"prompt": ""}),
        ("/v1/completions/render", {"prompt": "x", "temperature": 9}),
        ("/v1/chat/completions/render", {"messages": [{"role": "robot", "content": "x"}]}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "x" * 600}]}),
    ],
)
async def test_what_would_be_refused_is_not_rendered(http, path, body):
    rendered = await http.post(path, json=body)
    asked = await http.post(path.removesuffix("/render"), json=body)
    assert rendered.status_code == 400
    assert rendered.json() == asked.json()
