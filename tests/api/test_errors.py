"""Every refusal has OpenAI's nested body, the right status, and names the field."""

from __future__ import annotations

import json
import re

import pytest

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
LEAKS = re.compile(r"0x[0-9a-f]{6,}|Traceback|/root|/tmp|site-packages|object at|pydantic|msgspec|\.py\b")

# path, fields, status, param, code (None = any), what the message says
COMPLETION, CONVERSATION = "/v1/completions", "/v1/chat/completions"
ROWS = [
    # one row per row of the parameters' table
    (COMPLETION, {"model": "nope"}, 404, "model", "model_not_found", "The model `nope` does not exist."),
    (CONVERSATION, {"model": "nope"}, 404, "model", "model_not_found", "The model `nope` does not exist."),
    (COMPLETION, {"prompt": ""}, 400, "prompt", None, "empty"),
    (COMPLETION, {"prompt": None}, 400, "prompt", None, "required"),
    (COMPLETION, {"prompt": []}, 400, "prompt", None, "empty"),
    (COMPLETION, {"prompt": [[]]}, 400, "prompt", None, "empty"),
    (COMPLETION, {"prompt": ["a", ""]}, 400, "prompt", None, "empty"),
    (COMPLETION, {"prompt": ["a"] * 1025}, 400, "prompt", None, "1024"),
    (COMPLETION, {"prompt": [320]}, 400, "prompt", None, "320"),
    (COMPLETION, {"prompt": [-1]}, 400, "prompt", None, "-1"),
    (CONVERSATION, {"messages": []}, 400, "messages", None, "messages"),
    (CONVERSATION, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages", None, "wizard"),
    (CONVERSATION, {"messages": [{"role": "user"}]}, 400, "messages", None, "content"),
    (
        CONVERSATION,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        400,
        "messages",
        None,
        "image_url",
    ),
    (COMPLETION, {"max_tokens": 0}, 400, "max_tokens", None, "at least 1"),
    (COMPLETION, {"max_tokens": -1}, 400, "max_tokens", None, "max_tokens"),
    (
        COMPLETION,
        {"max_tokens": 512},
        400,
        None,
        "context_length_exceeded",
        "This model's maximum context length is 512",
    ),
    (
        COMPLETION,
        {"prompt": "x" * 513},
        400,
        None,
        "context_length_exceeded",
        "This model's maximum context length is 512",
    ),
    (
        COMPLETION,
        {"prompt": "x" * 99999},
        400,
        None,
        "context_length_exceeded",
        "This model's maximum context length is",
    ),
    (
        COMPLETION,
        {"prompt": [1] * 513},
        400,
        None,
        "context_length_exceeded",
        "This model's maximum context length is 512",
    ),
    (
        CONVERSATION,
        {"max_completion_tokens": 512},
        400,
        None,
        "context_length_exceeded",
        "This model's maximum context",
    ),
    (CONVERSATION, {"max_completion_tokens": 0}, 400, "max_completion_tokens", None, "at least 1"),
    (COMPLETION, {"temperature": 2.1}, 400, "temperature", None, "temperature must be in [0, 2]"),
    (COMPLETION, {"temperature": -0.1}, 400, "temperature", None, "temperature must be in [0, 2]"),
    (COMPLETION, {"top_p": 0}, 400, "top_p", None, "top_p must be in (0, 1]"),
    (COMPLETION, {"top_p": 1.1}, 400, "top_p", None, "top_p must be in (0, 1]"),
    (COMPLETION, {"top_k": -2}, 400, "top_k", None, "top_k"),
    (COMPLETION, {"min_p": 1.5}, 400, "min_p", None, "min_p"),
    (COMPLETION, {"repetition_penalty": 0}, 400, "repetition_penalty", None, "repetition_penalty"),
    (COMPLETION, {"n": 0}, 400, "n", None, "n"),
    (COMPLETION, {"prompt": ["x"] * 1000, "n": 5}, 400, "n", None, "4096"),
    (COMPLETION, {"n": 2**40}, 400, "n", None, "n"),
    (COMPLETION, {"n": 2, "temperature": 0}, 400, "n", None, "n must be 1 when using greedy sampling"),
    (COMPLETION, {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", None, "4"),
    (COMPLETION, {"stop": [""]}, 400, "stop", None, "stop cannot contain an empty string"),
    (COMPLETION, {"stop": ""}, 400, "stop", None, "stop cannot contain an empty string"),
    (COMPLETION, {"stop": [1]}, 400, "stop", None, "string"),
    (COMPLETION, {"seed": 2**63}, 400, "seed", None, "seed"),
    (COMPLETION, {"seed": 1.5}, 400, "seed", None, "integer"),
    (COMPLETION, {"presence_penalty": 2.5}, 400, "presence_penalty", None, "presence_penalty must be in [-2, 2]"),
    (COMPLETION, {"frequency_penalty": -3}, 400, "frequency_penalty", None, "frequency_penalty must be in [-2, 2]"),
    (COMPLETION, {"logit_bias": {"320": 1}}, 400, "logit_bias", None, "320"),
    (COMPLETION, {"logit_bias": {"x": 1}}, 400, "logit_bias", None, "token ids"),
    (COMPLETION, {"logit_bias": {"1": "x"}}, 400, "logit_bias.1", None, "number"),
    (COMPLETION, {"logprobs": 21}, 400, "logprobs", None, "20"),
    (COMPLETION, {"logprobs": -2}, 400, "logprobs", None, "logprobs"),
    (COMPLETION, {"logprobs": True}, 400, "logprobs", None, "integer"),
    (CONVERSATION, {"top_logprobs": 2}, 400, "top_logprobs", None, "`logprobs` must be set to true"),
    (CONVERSATION, {"logprobs": True, "top_logprobs": 21}, 400, None, None, "20"),
    (CONVERSATION, {"logprobs": True, "top_logprobs": -1}, 400, "top_logprobs", None, "top_logprobs"),
    (CONVERSATION, {"logprobs": 2}, 400, "logprobs", None, "boolean"),
    (COMPLETION, {"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", None, "stream=True"),
    (COMPLETION, {"prompt_logprobs": 21}, 400, "prompt_logprobs", None, "20"),
    (
        COMPLETION,
        {"stream_options": {"include_usage": True}},
        400,
        "stream_options",
        None,
        "only be defined when `stream=True`",
    ),
    (COMPLETION, {"min_tokens": 17}, 400, "min_tokens", None, "min_tokens"),
    (COMPLETION, {"min_tokens": -1}, 400, "min_tokens", None, "min_tokens"),
    (COMPLETION, {"stop_token_ids": [320]}, 400, "stop_token_ids", None, "320"),
    (COMPLETION, {"allowed_token_ids": [320]}, 400, "allowed_token_ids", None, "320"),
    (COMPLETION, {"allowed_token_ids": []}, 400, "allowed_token_ids", None, "empty"),
    (COMPLETION, {"bad_words": [""]}, 400, "bad_words", None, "empty"),
    (COMPLETION, {"bad_words": ["x"] * 200}, 400, "bad_words", None, "128"),
    (COMPLETION, {"cache_salt": ""}, 400, "cache_salt", None, "at least 1"),
    (COMPLETION, {"cache_salt": "x" * 129}, 400, "cache_salt", None, "128"),
    (COMPLETION, {"request_id": "a b"}, 400, "request_id", None, "pattern"),
    (COMPLETION, {"n": 129}, 400, "n", None, "between 1 and 128"),
    (CONVERSATION, {"n": 129}, 400, "n", None, "between 1 and 128"),
    *(
        (path, {"slo": {name: value}}, 400, f"slo.{name}", None, name)
        for path in (COMPLETION, CONVERSATION)
        for name in ("ttft_ms", "itl_ms", "deadline_ms")
        for value in (0, -1, 0.5, 1e300, "100", True, [])
    ),
    (COMPLETION, {"slo": {"tpot_ms": 5}}, 400, "slo.tpot_ms", None, "ttft_ms, itl_ms, deadline_ms"),
    (CONVERSATION, {"slo": {"ttft_ms": 5, "x\n": None}}, 400, "slo.x\ufffd", None, "unknown"),
    (COMPLETION, {"slo": 500}, 400, "slo", None, "slo"),
    (COMPLETION, {"slo": [500]}, 400, "slo", None, "slo"),
    *(
        (path, {"timeout": value}, 400, "timeout", None, "timeout")
        for path in (COMPLETION, CONVERSATION)
        for value in (0, -1, 0.0001, 1e9, "5", True)
    ),
    (COMPLETION, {"tenant": ""}, 400, "tenant", None, "at least 1"),
    (COMPLETION, {"tenant": "x" * 65}, 400, "tenant", None, "64"),
    (COMPLETION, {"tenant": "é" * 33}, 400, "tenant", None, "64 bytes"),
    (COMPLETION, {"tenant": 7}, 400, "tenant", None, "string"),
    (COMPLETION, {"priority": 1}, 400, "priority", None, "--scheduling-policy priority"),
    (CONVERSATION, {"priority": -1}, 400, "priority", None, "--scheduling-policy priority"),
    (COMPLETION, {"truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens", None, "between 1 and 512"),
    (CONVERSATION, {"chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs", None, "tokenize"),
    (CONVERSATION, {"reasoning_effort": "high"}, 400, "reasoning_effort", "unsupported_parameter", "template"),
    (CONVERSATION, {"reasoning_effort": "hard"}, 400, "reasoning_effort", "invalid_value", "xhigh"),
    (CONVERSATION, {"chat_template_kwargs": {"unread": True}}, 400, "chat_template_kwargs", None, "unread"),
    (
        CONVERSATION,
        {"continue_final_message": True, "add_generation_prompt": True},
        400,
        "continue_final_message",
        None,
        "cannot both be set",
    ),
    *(
        (path, fields, 400, param, "invalid_value", says)
        for path in (COMPLETION, CONVERSATION)
        for fields, param, says in (
            ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema or structural_tag"),
            ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "field must be provided"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}},
                "response_format",
                "is refused",
            ),
            ({"structured_outputs": {}}, "structured_outputs", "Exactly one"),
            ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "Exactly one"),
            ({"structured_outputs": {"poem": "a"}}, "structured_outputs.poem", "is unknown"),
            ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "is refused"),
            ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "none of them empty"),
            ({"guided_regex": "["}, "guided_regex", "is refused"),
            ({"guided_json": "{"}, "guided_json", "not valid JSON"),
            ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice", "both constrain"),
            ({"guided_whitespace_pattern": " "}, "structured_outputs", "Exactly one"),
            ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "whose text has an end"),
        )
    ),
    # not built: refused by name, never ignored
    *(
        (path, {name: value}, 400, name, "unsupported_parameter", f"`{name}`")
        for path in (COMPLETION, CONVERSATION)
        for name, value in {
            "suffix": "x",
            "best_of": 3,
            "separate_reasoning": False,
            "use_beam_search": True,
            "prompt_embeds": "x",
            "vllm_xargs": {},
            "thinking_token_budget": 5,
        }.items()
    ),
    *(
        (COMPLETION, {name: value}, 400, name, "unsupported_parameter", f"`{name}`")
        for name, value in {"tools": [{}], "tool_choice": "required", "functions": []}.items()
    ),
    *(
        (CONVERSATION, {name: value}, 400, name, "unsupported_parameter", f"`{name}`")
        for name, value in {
            "modalities": ["text", "audio"],
            "audio": {"voice": "x"},
            "chat_template": "{{ 1 }}",
            "documents": [],
            "web_search_options": {},
        }.items()
    ),
]


def check_error(response, status, param=None, code=None, says=""):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    assert says in error["message"]
    assert not LEAKS.search(response.text), response.text
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code


@pytest.mark.parametrize(("path", "fields", "status", "param", "code", "says"), ROWS)
async def test_each_row_of_the_table(http, fake, path, fields, status, param, code, says):
    base = {"prompt": "Hi"} if path == COMPLETION else CHAT
    for stream in (False, True) if not {"stream_options", "prompt_logprobs"} & set(fields) else (False,):
        response = await http.post(path, json={**base, **({"stream": True} if stream else {}), **fields})
        check_error(response, status, param, code, says)
    assert fake.added == []


INTEGERS = ["n", "max_tokens", "min_tokens", "top_k", "seed", "priority", "prompt_logprobs", "truncate_prompt_tokens"]
NUMBERS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
FLAGS = ["stream", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "add_special_tokens"]
NOT_INTEGERS = ["1", "true", "1.5", '"1"', "1.0", "[]", "{}", "1e308", "99999999999999999999", "-9223372036854775809"]
NOT_NUMBERS = ["true", '"1"', "[]", "{}", "NaN", "Infinity", "-Infinity", "1e400", "9" * 400, "9" * 5000, "nan"]
NOT_FLAGS = ["1", "0", '"true"', "[]", "1.0"]


@pytest.mark.parametrize("path", [COMPLETION, CONVERSATION])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in INTEGERS for value in NOT_INTEGERS[1:]),
        *((field, value) for field in NUMBERS for value in NOT_NUMBERS),
        *((field, value) for field in FLAGS for value in NOT_FLAGS),
        *(("stop", value) for value in ("1", "{}", "[[]]", "[null]")),
        *(("stop_token_ids", value) for value in ("1", '["1"]', "[1.0]", "[true]", "[9223372036854775808]")),
        *(("logit_bias", value) for value in ("[]", '{"1": null}', '{"1": true}', '"x"')),
        *(("stream_options", value) for value in ("[]", "true", '{"include_usage": 1}')),
        *(("model", value) for value in ("1", "[]", "{}")),
    ],
)
async def test_wrong_types_are_refused(http, fake, path, field, value):
    base = {"prompt": "Hi"} if path == COMPLETION else CHAT
    text = json.dumps(base)[:-1] + f', "{field}": {value}}}'
    response = await http.post(path, content=text, headers={"content-type": "application/json"})
    check_error(response, 400)
    assert fake.added == []


@pytest.mark.parametrize(
    "prompt",
    [
        1,
        1.5,
        True,
        {},
        [None],
        [1, "a"],
        ["a", 1],
        [[1], "a"],
        [[1.5]],
        [[True]],
        [True],
        [[[1]]],
        [1, 2.0],
        ["a", ["b"]],
    ],
)
async def test_prompts_of_a_wrong_shape(http, fake, prompt):
    check_error(await http.post(COMPLETION, json={"prompt": prompt}), 400, "prompt")
    assert fake.added == []


@pytest.mark.parametrize("token_id", [-(2**63), -1, 320, 2**31, 2**63 - 1, 2**63, 2**64])
@pytest.mark.parametrize("field", ["prompt", "stop_token_ids", "allowed_token_ids", "logit_bias", "tokens"])
async def test_token_ids_are_bounded_by_the_logits(http, fake, field, token_id):
    value = {str(token_id): 1} if field == "logit_bias" else [token_id]
    path, base = ("/detokenize", {}) if field == "tokens" else (COMPLETION, {"prompt": "x"})
    check_error(await http.post(path, json={**base, field: value}), 400)
    assert fake.added == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "a"}x', "not valid JSON"),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
async def test_bodies_that_are_no_json_object(http, content, says):
    for path in (COMPLETION, CONVERSATION, "/tokenize", "/detokenize"):
        response = await http.post(path, content=content, headers={"content-type": "application/json"})
        check_error(response, 400, says=says)


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"]
)
async def test_anything_but_json_is_an_unsupported_media_type(http, kind):
    headers = {"content-type": kind} if kind else {}
    check_error(
        await http.post(COMPLETION, content=b'{"prompt": "x"}', headers=headers), 415, says="Unsupported Media Type"
    )


async def test_compressed_bodies_are_refused(http):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    check_error(await http.post(COMPLETION, content=b"x", headers=headers), 415)


async def test_a_body_beyond_the_limit(serve, fake):
    async with serve(max_body_bytes=1000) as http:
        ok = await http.post(COMPLETION, json={"prompt": "x", "user": "u" * 900})
        assert ok.status_code == 200
        check_error(
            await http.post(COMPLETION, json={"prompt": "x", "user": "u" * 1000}), 413, code="request_too_large"
        )

        async def chunked():
            for _ in range(100):
                yield b" " * 100

        headers = {"content-type": "application/json"}
        check_error(await http.post(COMPLETION, content=chunked(), headers=headers), 413)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", COMPLETION, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/", 404),
        ("POST", "//v1/completions", 404),
    ],
)
async def test_the_routers_own_refusals(http, method, path, status):
    response = await http.request(method, path)
    if status == 404 and response.status_code == 307:
        pytest.fail("a redirect would leak the Host header")
    check_error(response, status)


async def test_an_unexpected_exception_is_a_silent_500(http, fake, caplog, monkeypatch):
    def broken(message):
        raise ZeroDivisionError("the prompt was: secret words")

    monkeypatch.setattr(fake, "send", broken)
    response = await http.post(COMPLETION, json={"prompt": "x"})
    check_error(response, 500, code="internal_error")
    assert "ZeroDivisionError at" in caplog.text
    assert "secret words" not in caplog.text
    assert http.app.state.quire.admission.open == 0


async def test_values_are_shown_short_and_clean(http):
    response = await http.post(COMPLETION, json={"prompt": "x", "n": "\x1b[31m" + "y" * 5000})
    check_error(response, 400, "n")
    assert len(response.text) < 400
    assert "\\u001b" not in response.text
