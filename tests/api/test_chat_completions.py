"""/v1/chat/completions: messages in, the wire out."""

from __future__ import annotations

import json
import re

import pytest

USER = [{"role": "user", "content": "Hi"}]


async def chat(http, **body):
    response = await http.post("/v1/chat/completions", json={"messages": USER, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_whole_answer(http, fake):
    answer = await chat(http)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, world!", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert bytes(fake.added[0].prompt_ids) == b"<user>Hi\n<assistant>"


async def test_unset_length_is_the_rest_of_the_context(http, fake):
    await chat(http)
    await chat(http, max_tokens=5)
    await chat(http, max_tokens=5, max_completion_tokens=7)
    assert [request.params.max_tokens for request in fake.added] == [512 - 20, 5, 7]


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({"add_generation_prompt": False}, "<user>Hi\n"),
        ({"chat_template_kwargs": {"mood": "calm"}}, "<user>Hi\n<assistant>calm"),
        ({"messages": [*USER, {"role": "assistant", "content": "Sure, "}], "continue_final_message": True}, "Sure, "),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            "a\nb",
        ),
    ],
)
async def test_the_template_decides_the_prompt(http, fake, extra, prompt):
    await chat(http, **extra)
    rendered = bytes(fake.added[0].prompt_ids).decode()
    assert prompt in rendered
    if "continue_final_message" in extra:
        assert rendered.endswith(prompt)


async def test_logprobs_carry_bytes(http, fake):
    fake.answer = lambda request, index: list("é".encode())
    (choice,) = (await chat(http, logprobs=True, top_logprobs=2))["choices"]
    first, second = choice["logprobs"]["content"]
    assert first["token"] == "\ufffd"
    assert bytes(first["bytes"] + second["bytes"]).decode() == "é" == choice["message"]["content"]
    assert [len(token["top_logprobs"]) for token in (first, second)] == [2, 2]
    assert first["top_logprobs"][0]["logprob"] == first["logprob"]
    (choice,) = (await chat(http, logprobs=True))["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


async def test_prompt_logprobs_and_ids_lie_on_the_answer(http):
    answer = await chat(http, prompt_logprobs=0, return_token_ids=True)
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"]) == 20
    assert answer["choices"][0]["token_ids"][-1] == 256


async def test_the_wire_to_the_letter(http, fake):
    fake.answer = lambda request, index: [*b"ok", 256]
    fake.step_seconds = 0.2  # tokens of several steps merge where the reader is slower than the engine
    response = await http.post(
        "/v1/chat/completions", json={"messages": USER, "stream": True}, headers={"X-Request-Id": "golden"}
    )
    head = '{"id":"chatcmpl-golden","object":"chat.completion.chunk","created":0,"model":"tiny","choices":[{"index":0,'
    assert re.sub(r'"created":\d+', '"created":0', response.text) == (
        f'data: {head}"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        f'data: {head}"delta":{{"content":"o"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        f'data: {head}"delta":{{"content":"k"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        f'data: {head}"delta":{{"content":""}},"logprobs":null,"finish_reason":"stop","stop_reason":null}}]}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_each_choice_opens_with_its_role_once(stream):
    events = await stream("/v1/chat/completions", messages=USER, n=3)
    opened = [e["choices"][0]["index"] for e in events if "role" in e["choices"][0]["delta"]]
    assert sorted(opened) == [0, 1, 2]
    for index in range(3):
        deltas = [e["choices"][0]["delta"] for e in events if e["choices"][0]["index"] == index]
        assert "role" in deltas[0]
        assert "".join(delta.get("content", "") for delta in deltas) == "Hello, world!"


async def test_continuous_usage_grows_and_ends_at_the_whole(stream):
    events = await stream(
        "/v1/chat/completions",
        messages=USER,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 14
    assert events[-1]["choices"] == []
    assert all(event["choices"] for event in events[:-1])


async def test_streamed_logprobs_are_those_of_the_whole(http, stream):
    body = {"logprobs": True, "top_logprobs": 1, "seed": 1}
    events = await stream("/v1/chat/completions", messages=USER, **body)
    pieces = [e["choices"][0]["logprobs"] for e in events]
    streamed = [token for piece in pieces if piece for token in piece["content"]]
    assert streamed == (await chat(http, **body))["choices"][0]["logprobs"]["content"]


async def test_a_model_without_a_template_says_so(serve, folder, fake, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    fake.folder = bare
    async with serve() as http:
        response = await http.post("/v1/chat/completions", json={"messages": USER})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages"
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200


async def test_a_template_of_the_request_is_taken_where_callers_are_trusted(serve, fake):
    body = {"messages": [{"role": "user", "content": "Hi"}], "chat_template": "[{{ messages[0].content }}{{ mood }}]"}
    async with serve(trust_request_chat_template=True) as http:
        kwargs = {"chat_template_kwargs": {"mood": "!"}}
        assert (await http.post("/v1/chat/completions", json=body | kwargs)).status_code == 200
        assert bytes(fake.added[0].prompt_ids) == b"[Hi!]"
        assert bytes((await http.post("/tokenize", json=body)).json()["tokens"]) == b"[Hi]"
        for source, says in (
            ("{% for %}", "not usable"),
            ("{{ 'x' * 10**10 }}", "cannot write"),
            ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "runs for more than"),
            ("x" * 2**21, None),
        ):
            response = await http.post("/v1/chat/completions", json=body | {"chat_template": source})
            assert response.status_code in (400, 413)
            assert says is None or says in response.json()["error"]["message"]
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    async with serve() as http:
        for path in ("/v1/chat/completions", "/tokenize"):
            response = await http.post(path, json=body)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "chat_template"
