"""/v1/messages and /v1/messages/count_tokens: events, stream and whole, thinking, stop reasons, Anthropic's errors."""

from __future__ import annotations

import asyncio
import json
import re
import shutil

import pytest

EOS = 256
TOOLS = [{"name": "add", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
THINK = {"type": "adaptive"}
USER = {"role": "user", "content": "Hi"}
ANSWERS = {
    "text": "Hello, world!",
    "nothing": "",
    "call": CALL,
    "thinking": "<think>well</think>done",
    "everything": f"<think>a\nb</think>Let me see: é👍 {CALL}\n{CALL} and then",
}
PING = b'event: ping\ndata: {"type":"ping"}\n\n'.decode()


def named_events(text):
    """The payloads of a stream, pings left out; checks its frames, and that one event begins and one ends it."""
    frames = text.split("\n\n")
    assert frames.pop() == ""
    events = []
    for frame in frames:
        name, data = re.fullmatch(r"event: (\S+)\ndata: (.*)", frame).groups()
        assert json.loads(data)["type"] == name
        if name != "ping":
            events.append(json.loads(data))
    names = [event["type"] for event in events]
    assert names[0] == "message_start"
    assert names[-1] in ("message_stop", "error")
    assert sum(name in ("message_start", "message_stop", "error") for name in names) == 2
    return events


def said(fake, text, per_step=1):
    fake.answer = lambda request, index: [*text.encode(), EOS]
    fake.tokens_per_step = per_step
    fake.facts = {"max_model_len": 2048}


@pytest.fixture
async def roomy(serve, fake):
    """A model with room for a description of tools, spelled byte by byte, and an answer."""
    fake.facts = {"max_model_len": 2048}
    async with serve() as http:
        yield http


async def whole(http, **body):
    response = await http.post("/v1/messages", json={"messages": [USER], "max_tokens": 400, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def streamed(http, **body):
    body = {"messages": [USER], "max_tokens": 400, "stream": True, **body}
    response = await http.post("/v1/messages", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return named_events(response.text)


def put_together(events):
    """The message that a client makes of a stream's events."""
    message = dict(events[0]["message"])
    texts = []
    for event in events:
        kind = event["type"]
        if kind == "content_block_start":
            assert event["index"] == len(message["content"]) == len(texts)
            message["content"].append(dict(event["content_block"]))
            texts.append("")
        elif kind == "content_block_delta":
            texts[event["index"]] += "".join(value for name, value in event["delta"].items() if name != "type")
        elif kind == "content_block_stop":
            block = message["content"][event["index"]]
            assert event["index"] == len(texts) - 1
            if block["type"] == "tool_use":
                block["input"] = json.loads(texts[-1])
            else:
                block["thinking" if block["type"] == "thinking" else "text"] = texts[-1]
        elif kind == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    return message


def without_ids(message):
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {**message, "id": None, "content": content}


@pytest.mark.parametrize("finish", ["abort", "repetition"])
async def test_what_would_have_gone_on_is_cut_in_the_one_word_that_clients_know(http, fake, finish):
    fake.finish = finish
    response = await http.post("/v1/messages", json={"messages": [USER], "max_tokens": 50})
    assert response.json()["stop_reason"] == "max_tokens"


async def test_the_events_of_a_text(http, fake):
    said(fake, "Hello", per_step=3)
    events = await streamed(http)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["stop_reason"] is None
    assert events[1]["content_block"] == {"type": "text", "text": ""}
    assert events[2]["delta"] == {"type": "text_delta", "text": "Hel"}
    assert events[5]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert bytes(fake.added[0].prompt_ids) == b"<user>Hi\n<assistant>"


@pytest.mark.parametrize("per_step", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_stream_is_whole_at_every_chunking(serve, fake, answer, per_step):
    said(fake, ANSWERS[answer], per_step)
    async with serve(reasoning_parser="qwen3") as http:
        expected = await whole(http, tools=TOOLS, thinking=THINK)
        events = await streamed(http, tools=TOOLS, thinking=THINK)
    assert without_ids(put_together(events)) == without_ids(expected)
    assert expected["stop_reason"] == ("tool_use" if CALL in ANSWERS[answer] else "end_turn")


async def test_the_blocks_of_thinking_text_and_calls(serve, fake):
    said(fake, ANSWERS["everything"])
    async with serve(reasoning_parser="qwen3") as http:
        message = await whole(http, tools=TOOLS, thinking=THINK)
    thinking, text, first, second, after = message["content"]
    assert thinking == {"type": "thinking", "thinking": "a\nb", "signature": ""}
    assert text == {"type": "text", "text": "Let me see: é👍"}
    assert (first["type"], first["name"], first["input"]) == ("tool_use", "add", {"x": 1})
    assert first["id"] != second["id"]
    assert after["text"] == "and then"


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}])
async def test_who_does_not_ask_for_thinking_gets_none(serve, fake, thinking):
    said(fake, ANSWERS["thinking"])
    async with serve(reasoning_parser="qwen3") as http:
        message = await whole(http, thinking=thinking)
        events = await streamed(http, thinking=thinking)
    assert message["content"] == put_together(events)["content"] == [{"type": "text", "text": "done"}]
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 19}


@pytest.fixture
def switching(fake, tmp_path):
    """A model whose template switches thinking, and knows efforts."""
    folder = shutil.copytree(fake.folder, tmp_path / "switching")
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ enable_thinking }} {{ reasoning_effort }}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": template}))
    fake.folder = folder


@pytest.mark.parametrize(
    ("fields", "switch"),
    [
        ({}, "False "),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "False "),
        ({"thinking": THINK}, "True "),
        ({"thinking": THINK, "output_config": {"effort": "high"}}, "True high"),
        ({"thinking": THINK, "chat_template_kwargs": {"enable_thinking": False}}, "False "),
    ],
)
async def test_thinking_is_switched_in_the_template(switching, serve, fake, fields, switch):
    async with serve() as http:
        await whole(http, **fields)
        response = await http.post("/v1/messages/count_tokens", json={"messages": [USER], **fields})
    assert bytes(fake.added[0].prompt_ids).decode() == f"<user>Hi{switch}"
    assert response.json() == {"input_tokens": len(f"<user>Hi{switch}")}


@pytest.mark.parametrize(
    ("answer", "fields", "reason", "sequence"),
    [
        ("Hello", {}, "end_turn", None),
        ("Hello", {"max_tokens": 3}, "max_tokens", None),
        ("one END two", {"stop_sequences": ["END", "x"]}, "stop_sequence", "END"),
        (CALL, {"tools": TOOLS}, "tool_use", None),
        (CALL, {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "add"}}, "tool_use", None),
        (CALL, {"tools": TOOLS, "max_tokens": 50}, "max_tokens", None),
        (CALL, {"tools": TOOLS, "tool_choice": {"type": "none"}}, "end_turn", None),
    ],
)
async def test_why_an_answer_ends(roomy, fake, answer, fields, reason, sequence):
    said(fake, answer)
    for message in (await whole(roomy, **fields), put_together(await streamed(roomy, **fields))):
        assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


async def test_arguments_that_are_cut_off_are_those_that_there_were(roomy, fake):
    said(fake, '<tool_call>{"name": "add", "arguments": {"x": 1, "text": "hal')
    (call,) = (await whole(roomy, tools=TOOLS, max_tokens=59))["content"]
    assert call["input"] == {"x": 1}


async def test_arguments_that_are_no_json_are_none(roomy, fake):
    said(fake, '<tool_call>{"name": "add", "arguments": {x 1}}</tool_call>')
    (call,) = (await whole(roomy, tools=TOOLS))["content"]
    assert call["input"] == {}


async def test_one_call_alone_where_calls_are_not_parallel(roomy, fake):
    said(fake, f"{CALL}\n{CALL}")
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len((await whole(roomy, tools=TOOLS, tool_choice={"type": "auto"}))["content"]) == 2
    assert len((await whole(roomy, tools=TOOLS, tool_choice=choice))["content"]) == 1


async def test_usage_counts_the_cache_beside_the_input(serve, fake):
    said(fake, "<think>abc</think>de")
    fake.num_cached = 4
    async with serve(reasoning_parser="qwen3") as http:
        message = await whole(http, thinking=THINK)
        events = await streamed(http, thinking=THINK)
    assert message["usage"] == put_together(events)["usage"]
    assert message["usage"] == {
        "input_tokens": 16,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 21,
        "output_tokens_details": {"thinking_tokens": 18},
    }
    assert events[0]["message"]["usage"]["input_tokens"] == 16


async def test_an_assistants_last_message_is_continued(http, fake):
    await whole(http, messages=[USER, {"role": "assistant", "content": "The answer is ("}])
    assert bytes(fake.added[0].prompt_ids) == b"<user>Hi\n<assistant>The answer is ("


@pytest.mark.parametrize(
    ("final", "prompt"),
    [
        ("", b"<user>Hi\n<assistant>"),
        ([{"type": "redacted_thinking", "data": "x"}], b"<user>Hi\n<assistant>"),
        ([{"type": "thinking", "thinking": "hm", "signature": ""}], b"<user>Hi\n<assistant>\n<assistant>"),
    ],
)
async def test_an_assistants_last_message_without_text_is_no_beginning(http, fake, final, prompt):
    message = {"role": "assistant", "content": final}
    await whole(http, messages=[USER, message])
    counted = await http.post("/v1/messages/count_tokens", json={"messages": [USER, message]})
    assert bytes(fake.added[0].prompt_ids) == prompt
    assert counted.json() == {"input_tokens": len(prompt)}


async def test_turns_alternate_for_templates_that_want_it(serve, fake, tmp_path):
    folder = shutil.copytree(fake.folder, tmp_path / "strict")
    template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": template}))
    fake.folder = folder
    said = {"role": "assistant", "content": "x"}
    async with serve() as http:
        await whole(http, messages=[USER, USER, said, said, USER])
    assert bytes(fake.added[0].prompt_ids) == b"<user>Hi\nHi<assistant>x\nx<user>Hi"


async def test_a_system_message_stands_where_it_was_said(http, fake):
    await whole(http, messages=[USER, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, USER])
    assert bytes(fake.added[0].prompt_ids) == b"<user>Hi\n<system>Be brief.\n<user>Hi\n<assistant>"


async def test_a_template_that_does_not_write_the_last_message_is_told_in_the_callers_words(serve, fake, tmp_path):
    folder = shutil.copytree(fake.folder, tmp_path / "fixed")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": "fixed"}))
    fake.folder = folder
    async with serve() as http:
        body = {"messages": [USER, {"role": "assistant", "content": "So"}], "max_tokens": 5}
        refusal = (await http.post("/v1/messages", json=body)).json()["error"]
    assert refusal["param"] == "messages"
    assert "continue_final_message" not in refusal["message"]


async def test_a_budget_means_nothing_where_no_thinking_is_marked(http, fake):
    said(fake, "Hello")
    message = await whole(http, thinking={"type": "enabled", "budget_tokens": 1024})
    assert message["content"] == [{"type": "text", "text": "Hello"}]
    assert fake.added[0].params.thinking is None


async def test_a_budget_bounds_the_thinking_of_who_marks_it(serve, fake):
    async with serve(reasoning_parser="qwen3") as http:
        await whole(http, thinking={"type": "enabled", "budget_tokens": 1024})
        await whole(http, thinking={"type": "disabled", "budget_tokens": 1024})
    assert fake.added[0].params.thinking.budget == 1024
    assert fake.added[1].params.thinking is None


async def test_an_answer_that_goes_on_inside_its_thinking(serve, fake):
    said(fake, "more</think>done")
    async with serve(reasoning_parser="qwen3") as http:
        begun = {"role": "assistant", "content": "<think>some"}
        message = await whole(http, messages=[USER, begun], thinking={"type": "enabled", "budget_tokens": 9})
    assert message["content"] == [
        {"type": "thinking", "thinking": "more", "signature": ""},
        {"type": "text", "text": "done"},
    ]
    assert fake.added[0].params.thinking.opened is True


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


async def test_a_schema_under_both_its_names(http, fake):
    asked = {"type": "json_schema", "schema": SCHEMA}
    await whole(http, output_format=asked)
    await whole(http, output_config={"format": asked})
    first, second = (request.params.grammar for request in fake.added)
    assert first is not None
    assert first == second


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"output_format": {"type": "json_schema", "schema": {"type": 5}}}, "output_format"),
        ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
        ({"output_format": {"type": "text"}}, "output_format.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ],
)
async def test_a_schema_is_refused_under_the_name_that_it_came_by(http, fields, name):
    response = await http.post("/v1/messages", json={"messages": [USER], "max_tokens": 5, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == name
    assert f"`{name}" in error["message"]
    assert "response_format" not in error["message"]


async def test_fields_of_chat_requests_are_taken(http, fake):
    await whole(http, seed=3, min_p=0.1, top_k=5, temperature=0.25, top_p=0.5, metadata={"user_id": "u"}, unknown_one=1)
    params = fake.added[0].params
    assert (params.seed, params.min_p, params.top_k, params.temperature, params.top_p) == (3, 0.1, 5, 0.25, 0.5)


async def test_tokens_are_counted_as_they_are_charged(http, fake):
    said(fake, "x")
    asked = {
        "system": [{"type": "text", "text": "Rules."}],
        "tools": TOOLS,
        "messages": [
            USER,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "add", "input": {"x": 2}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "3"}]},
        ],
    }
    response = await http.post("/v1/messages/count_tokens", json={"model": "tiny", **asked})
    assert not fake.added
    usage = (await whole(http, **asked, max_tokens=9, **{}))["usage"]
    assert response.json() == {"input_tokens": usage["input_tokens"]}
    assert usage["input_tokens"] > 100


FAILED = {
    "type": "error",
    "error": {
        "type": "api_error",
        "message": "The engine could not finish this request.",
        "param": None,
        "code": "engine_error",
    },
}


async def test_an_error_before_the_first_event_is_a_plain_answer(http, fake):
    fake.fail_request = "planned"
    response = await http.post("/v1/messages", json={"messages": [USER], "max_tokens": 5, "stream": True})
    assert response.status_code == 500
    assert response.json() == FAILED


async def test_an_error_after_the_first_event_ends_the_stream(http, fake, eventually):
    fake.answer = lambda request, index: [46] * 400
    fake.step_seconds = 0.005
    running = asyncio.ensure_future(streamed(http))
    await eventually(lambda: http.app.state.quire.metrics.stats.generated_tokens_total > 3)
    fake.fail_request = "ValueError: NaN in /root/model at 0x7f00deadbeef"
    events = await running
    assert events[-1] == FAILED
    assert sum(event["type"] == "content_block_delta" for event in events) > 3


async def test_a_long_wait_is_filled_with_pings(serve, fake):
    fake.gate.clear()
    async with serve(keep_alive_interval=0.05, request_timeout=0.4) as http:
        body = {"messages": [USER], "max_tokens": 5, "stream": True}
        response = await http.post("/v1/messages", json=body)
    assert PING in response.text
    assert not re.search("^:", response.text, re.MULTILINE)
    events = named_events(response.text)
    assert [event["type"] for event in events] == ["message_start", "error"]
    assert events[-1]["error"]["type"] == "timeout_error"


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
REFUSALS = [
    ({"messages": []}, "`messages` must not be empty"),
    ({"messages": None}, "`messages`"),
    ({"messages": ["x"]}, "`messages[0]` must be an object"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "`messages[0].role` must be one of user, assistant, system"),
    ({"messages": [{"role": "system", "content": [IMAGE]}]}, "`messages[0].content[0].type` is image"),
    (
        {"messages": [USER, {"role": "system", "content": "x", "clear_at": "next_user_message"}]},
        "`messages[1].clear_at`",
    ),
    ({"messages": [{"role": "user"}]}, "`messages[0].content` must be text"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "`messages[0].content[0]` must be an object"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "`messages[0].content[0].type` is image"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "`messages[0].content[0].text`"),
    ({"messages": [{"role": "user", "content": [USE]}]}, "`messages[0].content[0].type` is tool_use"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}]},
        "`messages[0].content[0].content[0].type` is image",
    ),
    ({"messages": [USER, {"role": "assistant", "content": [USE | {"input": "x"}]}]}, "`messages[1].content[0].input`"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "server_tool_use"),
    ({"messages": [USER, {"role": "assistant", "content": [USE]}]}, "tool_result"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "`messages` says nothing"),
    ({"system": 3}, "`system`"),
    ({"system": [IMAGE]}, "`system[0].type` is image"),
    ({"max_tokens": 0}, "`max_tokens` must be at least 1"),
    ({"max_tokens": None}, "`max_tokens`"),
    ({"max_tokens": 9999}, "This model's maximum context length is 512"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "length of the messages"),
    ({"stop_sequences": [""]}, "stop_sequences cannot contain an empty string"),
    ({"stop_sequences": ["a"] * 99}, "stop_sequences has 99 strings"),
    ({"stop": ["a"]}, "`stop_sequences`"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "`tools[0].type`"),
    ({"tools": [{"name": "f"}]}, "`tools[0].input_schema`"),
    ({"tools": [{"name": "f g", "input_schema": {}}]}, "`tools[0].name` must be 1 to 64"),
    ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "`tools[0].input_schema` must be"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "`tool_choice.name` must be text"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, "`tool_choice`"),
    ({"tools": TOOLS, "tool_choice": {"type": "some"}}, "`tool_choice.type`"),
    ({"tool_choice": {"type": "any"}}, "`tools` must be set"),
    ({"thinking": {"type": "sometimes"}}, "`thinking.type`"),
    ({"output_config": {"format": {"type": "regex"}}}, "`output_config.format.type`"),
    ({"mcp_servers": [{"url": "http://x"}]}, "`mcp_servers` is not supported"),
    ({"container": "c"}, "`container` is not supported"),
    ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, "`thread` is not supported"),
    ({"thread": {"type": "create"}}, "`thread` is not supported"),
    ({"compaction": {"type": "summarize"}}, "`compaction` is not supported"),
    (
        {"output_format": {"type": "json_schema"}, "output_config": {"format": {"type": "json_schema"}}},
        "`output_format` cannot stand beside `output_config.format`",
    ),
    ({"chat_template_kwargs": "x"}, "`chat_template_kwargs` must be an object"),
    ({"chat_template_kwargs": [1]}, "`chat_template_kwargs` must be an object"),
    ({"chat_template_kwargs": True}, "`chat_template_kwargs` must be an object"),
    ({"temperature": 3}, "temperature"),
    ({"n": 2}, "`n` is not a field of /v1/messages"),
    ({"seed": "x"}, "`seed`"),
]


@pytest.mark.parametrize(("fields", "says"), REFUSALS)
async def test_what_cannot_be_done_is_refused_by_name(http, fake, fields, says):
    response = await http.post("/v1/messages", json={"messages": [USER], "max_tokens": 5, **fields})
    assert response.status_code == 400
    answer = response.json()
    assert set(answer) == {"type", "error"}
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert says in answer["error"]["message"]
    assert not fake.added


async def test_every_refusal_has_anthropics_shape(serve):
    body = {"messages": [USER], "max_tokens": 5}
    async with serve(api_key=("right",), max_body_bytes=5000) as http:
        right = {"Authorization": "Bearer right"}
        answers = {
            "authentication_error": await http.post("/v1/messages", json=body),
            "not_found_error": await http.post("/v1/messages", json={**body, "model": "nope"}, headers=right),
            "request_too_large": await http.post("/v1/messages", content=b"x" * 6000, headers=right | JSON),
            "invalid_request_error": await http.get("/v1/messages", headers=right),
        }
        http.app.state.quire.admission.draining = True
        answers["overloaded_error"] = await http.post("/v1/messages", json=body, headers=right)
        elsewhere = await http.post("/v1/chat/completions", json=body)
    for kind, answer in answers.items():
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == kind
    statuses = [answer.status_code for answer in answers.values()]
    assert statuses == [401, 404, 413, 405, 503]
    assert answers["overloaded_error"].headers["retry-after"]
    assert "type" not in elsewhere.json()


JSON = {"Content-Type": "application/json"}
