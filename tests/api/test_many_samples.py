"""n in the thousands: nothing is held for a sample before it begins or after it ended, but what the answer says."""

from __future__ import annotations

import tracemalloc

import pytest

from quire.engine.messages import Chunk
from quire.engine.outputs import RequestStream, SampleStream, TextOptions

EOS = 256


@pytest.fixture
def many(fake):
    fake.facts = {"max_n": 10_000}
    fake.answer = lambda request, index: [*f"{index}".encode(), EOS]
    fake.tokens_per_step = 50
    return fake


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_ten_thousand_samples(many, serve, path):
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "n": 10_000, "max_tokens": 20}
    async with serve() as http:
        answer = (await http.post(path, json=body)).json()
        assert (await http.post(path, json={**body, "n": 10_001})).status_code == 400
        assert (http.app.state.quire.admission.open, http.app.state.quire.admission.requests) == (0, 0)
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [str(index) for index in range(10_000)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(10_000))
    assert answer["usage"]["completion_tokens"] == sum(len(text) + 1 for text in texts)


async def test_several_prompts_share_the_bound(many, serve):
    async with serve() as http:
        for prompts, n, status in ((2, 5000, 200), (2, 5001, 400), (1, 10_000, 200)):
            response = await http.post("/v1/completions", json={"prompt": ["x"] * prompts, "n": n, "max_tokens": 1})
            assert response.status_code == status, (prompts, n)


async def test_a_stream_of_them_ends_well_formed(many, serve, events):
    body = {"prompt": "x", "n": 2000, "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    async with serve() as http:
        pieces = events((await http.post("/v1/completions", json=body)).text)
    ended = [p["choices"][0]["index"] for p in pieces if p["choices"] and p["choices"][0]["finish_reason"]]
    assert sorted(ended) == list(range(2000))
    assert pieces[-1]["usage"]["completion_tokens"] == sum(len(str(index)) + 1 for index in range(2000))


async def test_a_place_comes_back_when_its_sample_ends(many, serve, eventually):
    import asyncio

    many.answer = lambda request, index: [97] * (1 if index < 90 else 400)
    many.tokens_per_step, many.step_seconds = 1, 0.01
    async with serve() as http:
        admission = http.app.state.quire.admission
        body = {"prompt": "x", "n": 100, "max_tokens": 400, "timeout": 20}
        running = asyncio.ensure_future(http.post("/v1/completions", json=body))
        await eventually(lambda: admission.open == 10)
        assert admission.requests == 1
        running.cancel()


class _Tokenizer:
    def opens_document(self, ids):
        return False

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for before any token came")


def test_nothing_is_made_for_samples_that_have_not_begun(monkeypatch):
    made = []
    original = SampleStream.__init__
    monkeypatch.setattr(
        SampleStream, "__init__", lambda self, *a, **k: (made.append(k["index"]), original(self, *a, **k))[0]
    )
    tracemalloc.start()
    stream = RequestStream(_Tokenizer(), TextOptions(), [1], n=10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made == []
    assert peak < 10_000
    assert not stream.finished


def test_what_has_ended_is_let_go(folder):
    from quire.engine.tokenizer import load_tokenizer

    stream = RequestStream(load_tokenizer(folder), TextOptions(stop=("b",)), [1], n=1000)
    for index in range(1000):
        stream.fold(Chunk("r", index, [*b"a"]))
        delta = stream.fold(Chunk("r", index, [*b"cb"], "length" if index % 2 else None))
        assert delta.finish_reason == "stop"
        assert stream.ended_early(delta) == (index % 2 == 0)
        assert stream.fold(Chunk("r", index, [*b"late"])).is_empty
        assert len(stream._open) == 0
    assert stream.finished
