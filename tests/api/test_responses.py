"""/v1/responses: the order of its events, that a stream and a whole answer are one, how it ends, what it refuses."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import pairwise

import pytest

EOS = 256
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
TOOLS = [{"type": "function", "name": "add", "parameters": SCHEMA}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
ANSWERS = {
    "text": "Hello, world!",
    "nothing": "",
    "call": CALL,
    "thinking": "<think>well</think>done",
    "everything": f"<think>a\nb</think>Let me see: é👍 {CALL}\n{CALL} and then",
    "only thinking": "<think>never ends",
}
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


def named_events(text):
    """The payloads of a stream; checks its frames, its numbers, and that one event ends it."""
    frames = text.split("\n\n")
    assert frames.pop() == ""
    events = []
    for frame in frames:
        if frame.startswith(":"):
            continue
        name, data = re.fullmatch(r"event: (\S+)\ndata: (.*)", frame).groups()
        events.append(json.loads(data))
        assert events[-1]["type"] == name
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] in TERMINAL for event in events] == [False] * (len(events) - 1) + [True]
    return events


def said(fake, text, per_step=1):
    fake.answer = lambda request, index: [*text.encode(), EOS]
    fake.tokens_per_step = per_step
    fake.facts = {"max_model_len": 2048}


async def whole(http, **body):
    response = await http.post("/v1/responses", json={"input": "Hi", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def streamed(http, **body):
    response = await http.post("/v1/responses", json={"input": "Hi", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return named_events(response.text)


def without_labels(value):
    """Without ids, which are random, and times."""
    if isinstance(value, dict):
        return {
            key: without_labels(item)
            for key, item in value.items()
            if key not in ("id", "call_id", "item_id", "created_at", "completed_at")
        }
    return [without_labels(item) for item in value] if isinstance(value, list) else value


async def test_the_events_of_a_text(http, fake):
    said(fake, "Hello", per_step=3)
    events = await streamed(http)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["delta"] for event in events[4:6]] == ["Hel", "lo"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert len({event["item_id"] for event in events if "item_id" in event} | {events[2]["item"]["id"]}) == 1
    assert bytes(fake.added[0].prompt_ids) == b"<user>Hi\n<assistant>"


async def test_the_events_of_thinking_and_a_call(serve, fake):
    said(fake, f"<think>hm</think>{CALL}", per_step=200)
    async with serve(reasoning_parser="qwen3") as http:
        events = await streamed(http, tools=TOOLS)
    assert [event["type"] for event in events[2:-1]] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    call = events[-2]["item"]
    assert (call["type"], call["name"], call["arguments"], call["status"]) == (
        "function_call",
        "add",
        '{"x": 1}',
        "completed",
    )
    assert call["call_id"] != call["id"]


@pytest.mark.parametrize("per_step", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_stream_is_whole_at_every_chunking(serve, fake, answer, per_step):
    """The items are put together here from the deltas alone, as a client that reads nothing else would."""
    said(fake, ANSWERS[answer], per_step)
    async with serve(reasoning_parser="qwen3") as http:
        expected = await whole(http, tools=TOOLS, seed=1)
        events = await streamed(http, tools=TOOLS, seed=1)
    assert without_labels(events[-1]["response"]) == without_labels(expected)
    texts = [""] * len(expected["output"])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    for event in events:
        if event["type"].endswith(".delta"):
            texts[event["output_index"]] += event["delta"]
        elif event["type"].endswith(("text.done", "arguments.done")):
            assert texts[event["output_index"]] == event.get("text", event.get("arguments"))
    assert done == events[-1]["response"]["output"]
    assert texts == [item["arguments"] if "arguments" in item else item["content"][0]["text"] for item in done]


async def test_an_item_opens_only_when_the_one_before_it_is_done(serve, fake):
    said(fake, ANSWERS["everything"])
    async with serve(reasoning_parser="qwen3") as http:
        events = await streamed(http, tools=TOOLS)
    steps = [event for event in events if event["type"].startswith("response.output_item.")]
    assert [step["output_index"] for step in steps] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for before, after in pairwise(steps):
        assert before["type"] != after["type"]
    kinds = [item["type"] for item in events[-1]["response"]["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call", "message"]


@pytest.mark.parametrize(("answer", "cut"), [("Hello", 3), (CALL, 50), ("<think>long thoughts", 12)])
async def test_an_answer_that_is_cut_off_is_incomplete(serve, fake, answer, cut):
    said(fake, answer)
    async with serve(reasoning_parser="qwen3") as http:
        events = await streamed(http, tools=TOOLS, max_output_tokens=cut)
        expected = await whole(http, tools=TOOLS, max_output_tokens=cut)
    assert events[-1]["type"] == "response.incomplete"
    response = events[-1]["response"]
    assert without_labels(response) == without_labels(expected)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][-1]["status"] == "incomplete"
    assert response["completed_at"] is None


async def test_one_call_alone_where_calls_are_not_parallel(http, fake):
    said(fake, f"{CALL}\n{CALL}")
    assert len((await whole(http, tools=TOOLS))["output"]) == 2
    assert len((await whole(http, tools=TOOLS, parallel_tool_calls=False))["output"]) == 1


@pytest.mark.parametrize("per_step", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_logprobs_are_those_of_the_tokens_of_each_text(serve, fake, answer, per_step):
    """One for each byte that is shown, markup and thinking left out, wherever the answer is cut."""
    said(fake, ANSWERS[answer], per_step)
    asked = {"tools": TOOLS, "top_logprobs": 2, "seed": 1}
    async with serve(reasoning_parser="qwen3") as http:
        expected = await whole(http, **asked)
        events = await streamed(http, **asked)
    assert expected["top_logprobs"] == 2
    assert without_labels(events[-1]["response"]) == without_labels(expected)
    for index, item in enumerate(expected["output"]):
        for part in item.get("content", ()):
            logprobs = part.get("logprobs", [])
            shown = b"".join(bytes(entry["bytes"]) for entry in logprobs)
            assert shown == (part["text"].encode() if part["type"] == "output_text" else b"")
            assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
            mine = [event for event in events if event.get("output_index") == index]
            deltas = [event for event in mine if event["type"] == "response.output_text.delta"]
            assert [entry for event in deltas for entry in event["logprobs"]] == logprobs
            done = [event for event in mine if event["type"] == "response.output_text.done"]
            assert [event["logprobs"] for event in done] == ([logprobs] if part["type"] == "output_text" else [])


async def test_logprobs_without_rivals(http, fake):
    said(fake, "Hi")
    response = await whole(http, include=["message.output_text.logprobs"])
    logprobs = response["output"][0]["content"][0]["logprobs"]
    assert [(entry["token"], entry["top_logprobs"]) for entry in logprobs] == [("H", []), ("i", [])]
    assert (await whole(http))["output"][0]["content"][0]["logprobs"] == []


async def test_of_the_tools_some_are_allowed(http, fake):
    said(fake, CALL)
    tools = [*TOOLS, {"type": "function", "name": "sub"}]
    await whole(http, tools=tools, tool_choice=allowed("sub"))
    response = await whole(http, tools=tools, tool_choice=allowed("add", mode="required"))
    free, required = fake.added
    assert b'"sub"' in bytes(free.prompt_ids)
    assert b'"add"' not in bytes(free.prompt_ids)
    assert free.params.grammar is None
    assert "add" in required.params.grammar.source
    assert "sub" not in required.params.grammar.source
    assert response["tool_choice"]["type"] == "allowed_tools"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_aborted_answer_is_cancelled(http, fake, eventually, stream):
    fake.answer = lambda request, index: [97] * 400
    fake.step_seconds = 0.005
    asking = streamed(http, request_id="mine") if stream else whole(http, request_id="mine")
    running = asyncio.ensure_future(asking)
    await eventually(lambda: http.app.state.quire.metrics.stats.generated_tokens_total > 3)
    await http.post("/abort_requests", json={"request_ids": ["resp_mine"]})
    answer = await running
    response = answer[-1]["response"] if stream else answer
    assert (response["status"], response["incomplete_details"]) == ("cancelled", None)
    assert response["output"][0]["status"] == "incomplete"
    assert not stream or answer[-1]["type"] == "response.incomplete"


async def test_an_end_of_repetition_is_a_bound_on_the_output(http, fake):
    fake.finish = "repetition"
    response = await whole(http)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


async def test_usage(serve, fake):
    said(fake, "<think>abc</think>de")
    fake.num_cached = 4
    async with serve(reasoning_parser="qwen3") as http:
        usage = (await whole(http))["usage"]
        assert (await streamed(http))[-1]["response"]["usage"] == usage
    assert usage == {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 21,
        "output_tokens_details": {"reasoning_tokens": 18},
        "total_tokens": 41,
    }


async def test_what_was_asked_is_told_back(http):
    asked = {
        "instructions": "Be brief.",
        "metadata": {"run": "7"},
        "max_output_tokens": 9,
        "temperature": 0.25,
        "top_p": 0.5,
        "tools": TOOLS,
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "truncation": "auto",
        "user": "somebody",
        "store": True,
    }
    response = await whole(http, **asked)
    assert {name: response[name] for name in asked} == asked | {"store": False}
    assert response["object"] == "response"
    assert response["model"] == "tiny"
    plain = await whole(http)
    assert plain["temperature"] == 0.5, "the model's own default"
    assert plain["metadata"] == {}


async def test_fields_of_chat_requests_are_taken(http, fake):
    said(fake, "one END two")
    response = await whole(
        http, stop="END", seed=3, top_k=5, min_p=0.1, request_id="mine", chat_template_kwargs={"mood": "!"}
    )
    assert response["id"] == "resp_mine"
    assert response["output"][0]["content"][0]["text"] == "one "
    params = fake.added[0].params
    assert (params.seed, params.top_k, params.min_p) == (3, 5, 0.1)
    assert bytes(fake.added[0].prompt_ids).endswith(b"!")


async def test_an_error_before_the_first_event_is_a_plain_answer(http, fake):
    fake.fail_request = "planned"
    response = await http.post("/v1/responses", json={"input": "Hi", "stream": True})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"


async def test_an_error_after_the_first_event_ends_the_stream(http, fake, eventually):
    fake.answer = lambda request, index: [46] * 400
    fake.step_seconds = 0.005
    running = asyncio.ensure_future(streamed(http))
    await eventually(lambda: http.app.state.quire.metrics.stats.generated_tokens_total > 3)
    fake.fail_request = "ValueError: NaN in /root/model at 0x7f00deadbeef"
    events = await running
    assert events[-1]["type"] == "response.failed"
    assert "response.output_item.done" not in [event["type"] for event in events]
    response = events[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"] == {"code": "engine_error", "message": "The engine could not finish this request."}
    (item,) = response["output"]
    assert item["status"] == "incomplete"
    assert item["content"][0]["text"] == "".join(event.get("delta", "") for event in events) != ""


async def test_a_long_wait_is_filled_with_comments(serve, fake):
    fake.gate.clear()
    async with serve(keep_alive_interval=0.05, request_timeout=0.4) as http:
        response = await http.post("/v1/responses", json={"input": "Hi", "stream": True})
    assert response.status_code == 200
    assert ": keep-alive\n\n" in response.text
    events = named_events(response.text)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == "request_timeout"
    assert events[-1]["response"]["output"] == []


async def test_nothing_is_kept(http):
    response = await whole(http, store=True)
    for method in ("GET", "DELETE"):
        answer = await http.request(method, f"/v1/responses/{response['id']}")
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"


USER = {"role": "user", "content": "x"}
FUNCTION = {"type": "function", "name": "f"}


def allowed(*names, mode="auto"):
    tools = [{"type": "function", "name": name} for name in names]
    return {"type": "allowed_tools", "mode": mode, "tools": tools}


REFUSALS = [
    ({"input": None}, "input", "required"),
    ({"input": []}, "input", "required"),
    ({"input": 3}, "input", ""),
    ({"input": ["x"]}, "input[0]", "must be an object"),
    ({"input": [USER] * 10_001}, "input", "10000"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "wizard"),
    ({"input": [USER, {"role": "user"}]}, "input[1].content", "null"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "input_image"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type", "input_file"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "null"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "refer"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type", "web_search_call"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "input[0].arguments", "JSON"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input[0].call_id", "text"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "text"),
    ({"input": [{"type": "reasoning", "content": "x"}]}, "input[0].content", "list"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
    ({"conversation": "c"}, "conversation", "keeps none"),
    ({"background": True}, "background", "stream"),
    ({"prompt": {"id": "p"}}, "prompt", "instructions"),
    ({"top_logprobs": 99}, "top_logprobs", "20"),
    ({"top_logprobs": -1}, "top_logprobs", "top_logprobs"),
    ({"logprobs": True}, "logprobs", "/v1/responses"),
    ({"functions": [FUNCTION]}, "functions", "/v1/responses"),
    ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "/v1/responses"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
    ({"tools": [FUNCTION, {"type": "function"}]}, "tools", "tools[1].name"),
    ({"tools": [FUNCTION | {"parameters": {"type": "string"}}]}, "tools", "tools[0].parameters"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "file_search"}}, "tool_choice", "file_search"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function"}}, "tool_choice.name", "text"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "g"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "allowed_tools"),
    ({"tools": [FUNCTION], "tool_choice": allowed("g")}, "tool_choice", "g"),
    ({"tools": [FUNCTION], "tool_choice": allowed("f", mode="maybe")}, "tool_choice", "maybe"),
    ({"tools": [FUNCTION], "tool_choice": allowed(7)}, "tool_choice.tools[0].name", "text"),
    ({"tool_choice": "required"}, "tool_choice", "tools"),
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
    ({"max_output_tokens": 9999}, "max_output_tokens", "This model's maximum context length is 512"),
    ({"input": "x" * 600}, "input", "This model's maximum context length is 512"),
    ({"temperature": 3}, "temperature", "temperature"),
    ({"truncation": "sometimes"}, "truncation", "sometimes"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort", "template"),
    ({"messages": []}, "messages", "/v1/responses"),
    ({"n": 2}, "n", "/v1/responses"),
    ({"seed": "x"}, "seed", "integer"),
    ({"stop": [""]}, "stop", "empty"),
]


@pytest.mark.parametrize(("fields", "param", "says"), REFUSALS)
async def test_what_cannot_be_done_is_refused_by_name(http, fake, fields, param, says):
    response = await http.post("/v1/responses", json={"input": "Hi", **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not fake.added


async def test_fields_that_ask_for_nothing_are_taken(http):
    await whole(
        http,
        background=False,
        previous_response_id=None,
        top_logprobs=0,
        include=["reasoning.encrypted_content"],
        service_tier="auto",
        prompt_cache_key="k",
        stream_options={"include_obfuscation": False},
        text={"verbosity": "low", "format": {"type": "text"}},
        reasoning={"summary": "auto"},
        tools=[],
        tool_choice="auto",
        something_new={"a": 1},
    )


async def test_truncation_leaves_out_the_oldest_turns(http, fake):
    turns = [{"role": role, "content": f"{i} " * 20} for i in range(20) for role in ("user", "assistant")]
    body = {"instructions": "Rules.", "input": [*turns, {"role": "user", "content": "Last."}], "max_output_tokens": 9}
    response = await http.post("/v1/responses", json=body)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    await whole(http, **body, truncation="auto")
    prompt = bytes(fake.added[0].prompt_ids).decode()
    assert prompt.startswith("<system>Rules.\n<user>")
    assert prompt.endswith("19 \n<user>Last.\n<assistant>")
    turn = len("<user>\n<assistant>\n") + 2 * len("19 " * 20)
    assert 512 - 9 - turn < len(prompt) <= 512 - 9, "as much as fits"
    body["input"] = "x" * 600
    response = await http.post("/v1/responses", json={**body, "truncation": "auto"})
    assert response.json()["error"]["code"] == "context_length_exceeded"
