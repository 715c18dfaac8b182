"""What every stream owes its reader, and that a stream and a whole answer are the same answer."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

EOS = 256
TEXTS = [
    "Hello, world!",
    "naïve café 👩‍👩‍👧 日本語",
    "a\nb\r\n\u2028data: x\n\n",
    "STOP STO ST S STOP!",
    "\ufffd\x00\x1b[31m",
    "",
]


ENGINE_ERROR = {
    "error": {
        "message": "The engine could not finish this request.",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
}


def text_of(events, index):
    mine = [event["choices"][0] for event in events if event["choices"] and event["choices"][0]["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in mine)


@pytest.mark.parametrize("per_step", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [[], ["STOP"], ["!", "日本"], ["\n\n", "👩‍👧"]])
async def test_stream_is_whole_at_every_chunking(http, stream, fake, text, per_step, stop):
    fake.answer = lambda request, index: [*text.encode(), EOS]
    fake.tokens_per_step = per_step
    body = {
        "prompt": "x",
        "max_tokens": 100,
        "stop": stop,
        "n": 2,
        "logprobs": 1,
        "stream_options": {"include_usage": True},
    }
    events = await stream("/v1/completions", **body)
    del body["stream_options"]
    whole = (await http.post("/v1/completions", json=body)).json()
    expected = text
    for cut in sorted(text.find(s) for s in stop if s in text)[:1]:
        expected = text[:cut]
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"] and e["choices"][0]["index"] == choice["index"]]
        assert choice["text"] == expected == "".join(piece["text"] for piece in mine)
        assert [p["finish_reason"] for p in mine].count(None) == len(mine) - 1
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"
        assert mine[-1]["stop_reason"] == choice["stop_reason"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [v for p in mine for v in p["logprobs"][name]] == choice["logprobs"][name]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


async def test_characters_are_never_torn(stream, fake):
    fake.answer = lambda request, index: list("é👍".encode())
    events = await stream("/v1/completions", prompt="x")
    assert text_of(events, 0) == "é👍"
    assert all(set(e["choices"][0]["text"]) <= set("é👍") for e in events)


async def test_an_unfinished_character_shows_once_at_the_end(stream, fake):
    fake.answer = lambda request, index: [*b"a", 0xF0, 0x9F]
    events = await stream("/v1/completions", prompt="x")
    assert text_of(events, 0) == "a\ufffd"


async def test_a_stop_string_across_tokens_aborts_the_engine_and_never_leaks(stream, fake, eventually):
    fake.answer = lambda request, index: [*b"one END two", *[46] * 300]
    fake.step_seconds = 0.002
    events = await stream("/v1/completions", prompt="x", stop="END", max_tokens=300)
    assert text_of(events, 0) == "one "
    assert events[-1]["choices"][0]["stop_reason"] == "END"
    await eventually(lambda: fake.aborted == [fake.added[0].request_id])


async def test_an_ended_request_is_not_aborted(http, fake):
    await http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2})
    assert fake.aborted == []


async def test_include_stop_str_in_output(stream, fake):
    fake.answer = lambda request, index: [*b"one END two"]
    events = await stream("/v1/completions", prompt="x", stop="END", include_stop_str_in_output=True)
    assert text_of(events, 0) == "one END"


async def test_silence_gets_comments(serve, fake):
    fake.gate.clear()
    async with serve(keep_alive_interval=0.02) as http:
        asyncio.get_running_loop().call_later(0.2, fake.gate.set)
        body = {"prompt": "x", "stream": True}
        text = (await http.post("/v1/completions", json=body)).text
    assert text.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_failure_in_the_engine_ends_the_stream_with_an_error_event(http, fake, events, path, eventually):
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.005
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True}
    running = asyncio.ensure_future(http.post(path, json=body))
    generated = http.app.state.quire.metrics
    await eventually(lambda: generated.stats.generated_tokens_total > 3)
    fake.fail_request = "ValueError: NaN in /root/model at 0x7f00deadbeef"
    *tokens, last = events((await running).text)
    assert len(text_of(tokens, 0)) > 3  # in few events, where the reader was slow
    assert all(event["choices"][0]["finish_reason"] is None for event in tokens)
    assert last == ENGINE_ERROR


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_before_the_first_token_is_a_plain_error(http, fake, path, stream):
    fake.fail_request = "ValueError: NaN in /root/model at 0x7f00deadbeef"
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "stream": stream}
    response = await http.post(path, json=body)
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/json"
    assert response.json() == ENGINE_ERROR


async def test_a_failure_after_a_comment_is_an_event(serve, fake, events):
    fake.gate.clear()
    fake.fail_request = "planned"
    async with serve(keep_alive_interval=0.02) as http:
        asyncio.get_running_loop().call_later(0.2, fake.gate.set)
        response = await http.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert response.status_code == 200
    assert events(response.text) == [ENGINE_ERROR]


async def test_random_traffic_ends_well_formed(http, fake, events):
    """Many requests at once, of all kinds, at random chunkings: each stream obeys the contract."""
    rng = random.Random(7)
    fake.answer = lambda request, index: [*rng.choice(TEXTS).encode(), *([EOS] if rng.random() < 0.7 else [])] or [EOS]
    fake.tokens_per_step = 2

    async def one(i: int) -> None:
        n = rng.randint(1, 3)
        body = {"prompt": "x" * rng.randint(1, 9), "n": n, "stream": True, "max_tokens": rng.randint(1, 40)}
        body["stop"] = rng.sample(["a", "wor", "日", "\n"], rng.randint(0, 2))
        response = await http.post("/v1/completions", json=body)
        seen = events(response.text)
        for index in range(n):
            reasons = [e["choices"][0]["finish_reason"] for e in seen if e["choices"][0]["index"] == index]
            assert reasons[-1] in ("stop", "length")
            assert set(reasons[:-1]) <= {None}

    await asyncio.gather(*(one(i) for i in range(60)))
    metrics = (await http.get("/metrics")).text
    assert 'quire_generation_tokens_total{model_name="tiny"}' in metrics


async def test_every_event_is_one_line_of_json(http, fake):
    fake.answer = lambda request, index: [*"\n\r\x85\u2028\u2029\x0b\x0c".encode(), EOS]
    text = (await http.post("/v1/completions", json={"prompt": "x", "stream": True})).content
    for frame in text.split(b"\n\n")[:-2]:
        assert b"\n" not in frame
        assert b"\r" not in frame
        json.loads(frame.removeprefix(b"data: "))


async def test_a_sample_that_met_its_stop_string_is_ended_while_its_siblings_go_on(http, fake):
    fake.answer = lambda request, index: [*(b"ab|" if index == 0 else b"abcdef"), *b"x" * 40]
    body = {"prompt": "Hi", "n": 2, "stop": "|", "max_tokens": 40, "temperature": 1.0}
    choices = (await http.post("/v1/completions", json=body)).json()["choices"]
    assert [(c["text"], c["finish_reason"]) for c in choices] == [("ab", "stop"), ("abcdef" + "x" * 34, "length")]
    assert fake.aborted == [fake.added[0].request_id]
