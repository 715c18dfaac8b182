"""The fields beside OpenAI's own that say how an answer is drawn, cut and shown."""

from __future__ import annotations

import pytest

from quire.scheduler.params import Repetition
from quire.server.registry import PREFIXES

EOS = 256
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


async def post(http, path, **body):
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_named_tokens_turn_log_probabilities_on(http, fake):
    (choice,) = (await post(http, "/v1/completions", prompt="Hi", logprob_token_ids=[65, 66, 65]))["choices"]
    params = fake.added[0].params
    assert (params.logprobs, params.logprob_token_ids) == (0, (65, 66))
    assert choice["logprobs"]["tokens"][0] == "H"
    (choice,) = (await post(http, "/v1/chat/completions", **CHAT, logprob_token_ids=[65, 66]))["choices"]
    assert fake.added[1].params.logprob_token_ids == (65, 66)
    first = choice["logprobs"]["content"][0]
    assert [rival["token"] for rival in first["top_logprobs"]] == ["A", "B"]


async def test_tokens_by_their_ids(http):
    options = {"max_tokens": 2, "return_tokens_as_token_ids": True}
    (choice,) = (await post(http, "/v1/completions", prompt="Hi", logprobs=1, echo=True, **options))["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{b}" for b in b"HiHe"]
    assert list(choice["logprobs"]["top_logprobs"][2]) == ["token_id:72"]
    (choice,) = (await post(http, "/v1/chat/completions", **CHAT, logprobs=True, top_logprobs=1, **options))["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["token_id:72", "token_id:101"]
    assert choice["logprobs"]["content"][0]["bytes"] == [72]


@pytest.mark.parametrize(
    ("side", "kept"), [(None, b"89"), ("left", b"89"), ("right", b"01")], ids=["default", "left", "right"]
)
async def test_truncation(http, fake, side, kept):
    fields = {} if side is None else {"truncation_side": side}
    await post(http, "/v1/completions", prompt="0123456789", truncate_prompt_tokens=2, **fields)
    assert fake.added[0].prompt_ids == list(kept)


async def test_repetition_detection_reaches_the_engine_and_its_end_is_told(http, fake):
    wish = {"max_pattern_size": 20, "min_count": 4}
    await post(http, "/v1/completions", prompt="Hi", repetition_detection=wish)
    await post(http, "/v1/completions", prompt="Hi", repetition_detection={"max_pattern_size": 0})
    assert fake.added[0].params.repetition == Repetition(max_pattern_size=20, min_count=4)
    assert fake.added[1].params.repetition is None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_stream_interval(stream, fake, path):
    fake.answer = lambda request, index: [*(b"abcdefghij" if index == 0 else b"xyz"), EOS]
    fake.step_seconds = 0.01
    events = await stream(path, prompt="x", **CHAT, n=2, temperature=1.0, stream_interval=4)
    for index, whole in ((0, "abcdefghij"), (1, "xyz")):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        texts = [choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in mine]
        texts = [text for text in texts if text]
        assert "".join(texts) == whole
        assert all(len(text) >= 4 for text in texts[1:-1])
        assert len(texts) <= 4
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]


@pytest.mark.parametrize("interval", [1, 3, 1000])
async def test_what_was_held_comes_before_the_error(http, fake, events, eventually, interval):
    import asyncio

    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.002
    body = {"prompt": "x", "max_tokens": 400, "stream": True, "stream_interval": interval}
    running = asyncio.ensure_future(http.post("/v1/completions", json=body))
    generated = http.app.state.quire.metrics
    await eventually(lambda: generated.stats.generated_tokens_total > 20)
    fake.fail_request = "broken"
    *news, last = events((await running).text)
    assert "error" in last
    assert sum(len(event["choices"][0]["text"]) for event in news) >= 20


async def test_prompt_text_is_what_the_model_read(http, stream):
    (choice,) = (await post(http, "/v1/completions", prompt=[72, 105, EOS], return_prompt_text=True))["choices"]
    assert choice["prompt_text"] == "Hi<eos>"
    answer = await post(http, "/v1/chat/completions", **CHAT, return_prompt_text=True)
    assert answer["prompt_text"] == "<user>Hi\n<assistant>"
    events = await stream("/v1/chat/completions", **CHAT, return_prompt_text=True)
    assert [event["prompt_text"] for event in events if "prompt_text" in event] == ["<user>Hi\n<assistant>"]


@pytest.mark.parametrize("content", ["Once", [{"type": "text", "text": "On"}, {"type": "text", "text": "ce"}]])
async def test_a_message_that_goes_on_is_echoed_with_its_beginning(http, stream, fake, content):
    fake.answer = lambda request, index: [*b" upon", EOS]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    body = {"messages": messages, "continue_final_message": True, "echo": True}
    whole = "Once upon" if isinstance(content, str) else "On\nce upon"
    answer = await post(http, "/v1/chat/completions", **body)
    assert answer["choices"][0]["message"]["content"] == whole
    events = await stream("/v1/chat/completions", **body)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == whole
    answer = await post(http, "/v1/chat/completions", **CHAT, echo=True)
    assert answer["choices"][0]["message"]["content"] == " upon"  # the last message is not the assistant's


async def test_documents_need_a_template_that_reads_them(http):
    response = await http.post("/v1/chat/completions", json={**CHAT, "documents": [{"text": "x"}]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "documents"


async def test_a_request_has_a_name_of_its_callers(http):
    for name in ("request_id", "rid"):
        for path, prefix in zip(("/v1/completions", "/v1/chat/completions", "/v1/responses"), PREFIXES, strict=False):
            base = {"input": "x"} if prefix == "resp_" else {"prompt": "x", **CHAT}
            answer = await post(http, path, **base, **{name: "mine"})
            assert answer["id"] == f"{prefix}mine"


async def test_as_many_words_may_be_bad_as_elsewhere(http, fake):
    await post(http, "/v1/completions", prompt="Hi", bad_words=[f"w{i}" for i in range(128)])
    assert len(fake.added[0].params.bad_words) == 256  # each at the start of a text, and after a space


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_interval": 0, "stream": True}, "stream_interval"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"repetition_detection": {"min_count": 3}}, "repetition_detection.max_pattern_size"),
        ({"repetition_detection": {"max_pattern_size": 129}}, "repetition_detection.max_pattern_size"),
        ({"repetition_detection": {"max_pattern_size": 3, "size": 1}}, "repetition_detection.size"),
        ({"logprob_token_ids": [320]}, "logprob_token_ids"),
        ({"logprob_token_ids": [1] * 513 + [2]}, None),  # equal ones count once
        ({"logprob_token_ids": [*range(320), -1]}, "logprob_token_ids"),
        ({"extra_key": "mine"}, "extra_key"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
async def test_what_is_refused(http, fields, param):
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = await http.post(path, json={"prompt": "Hi", **CHAT, **fields})
        assert response.status_code == (200 if param is None else 400), response.text
        if param is not None:
            assert response.json()["error"]["param"] == param
