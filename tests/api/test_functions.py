"""`functions` and `function_call`, the older names of tools: taken, and answered in kind."""

from __future__ import annotations

import json

import pytest

EOS = 256
USER = {"role": "user", "content": "Hi"}
ADD = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
CHAT = "/v1/chat/completions"


@pytest.fixture
def said(fake):
    def say(text):
        fake.answer = lambda request, index: [*text.encode(), EOS]
        fake.facts = {"max_model_len": 2048}

    return say


async def test_a_call_comes_back_under_the_old_name(serve, said, events):
    said(f"Well. {CALL}")
    body = {"messages": [USER], "functions": [ADD], "function_call": "auto"}
    async with serve(tool_call_parser="hermes") as http:
        (choice,) = (await http.post(CHAT, json=body)).json()["choices"]
        streamed = events((await http.post(CHAT, json={**body, "stream": True})).text)
    assert choice["finish_reason"] == "function_call"
    message = choice["message"]
    assert (message["content"], "tool_calls" in message) == ("Well.", False)
    assert message["function_call"] == {"name": "add", "arguments": '{"x": 1}'}
    deltas = [event["choices"][0]["delta"] for event in streamed]
    calls = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert calls[0] == {"name": "add", "arguments": ""}
    assert json.loads("".join(call["arguments"] for call in calls)) == {"x": 1}
    assert streamed[-1]["choices"][0]["finish_reason"] == "function_call"


async def test_one_call_is_all_there_is_room_for(serve, said):
    said(f"{CALL}\n{CALL}")
    async with serve(tool_call_parser="hermes") as http:
        (choice,) = (await http.post(CHAT, json={"messages": [USER], "functions": [ADD]})).json()["choices"]
    assert choice["message"]["function_call"]["name"] == "add"


async def test_a_function_that_must_be_called_is_a_grammar(serve, fake, said):
    said(CALL)
    body = {"messages": [USER], "functions": [ADD, {"name": "now"}], "function_call": {"name": "add"}}
    async with serve(tool_call_parser="hermes") as http:
        (choice,) = (await http.post(CHAT, json=body)).json()["choices"]
        await http.post(CHAT, json={**body, "function_call": "none"})
    named, none = (request.params.grammar for request in fake.added)
    assert "add" in named.source
    assert "now" not in named.source
    assert choice["finish_reason"] == "stop"  # what was asked for is no reason to finish
    assert none is None


async def test_an_old_conversation_is_todays(serve, fake, said):
    said("3")
    call = {"name": "add", "arguments": '{"x": 1}'}
    old = [
        USER,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "add", "content": "2"},
    ]
    new = [
        USER,
        {"role": "assistant", "tool_calls": [{"id": "call00001", "type": "function", "function": call}]},
        {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "2"},
    ]
    async with serve() as http:
        for messages in (old, new):
            response = await http.post(CHAT, json={"messages": messages})
            assert response.status_code == 200, response.text
        rendered = await http.post(f"{CHAT}/render", json={"messages": old, "functions": [ADD]})
    assert fake.added[0].prompt_ids == fake.added[1].prompt_ids
    assert '"add"' in rendered.json()["prompt"]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"functions": []}, "functions", "functions"),
        ({"functions": [{}]}, "functions", "`functions[0].name`"),
        ({"functions": [ADD], "tools": [{"type": "function", "function": ADD}]}, "tools", "older name"),
        ({"functions": [ADD], "function_call": {"name": "sub"}}, "function_call", "sub"),
        ({"functions": [ADD], "function_call": "required"}, "function_call", "required"),
        ({"function_call": {"name": "add"}}, "function_call", "functions"),
        ({"function_call": "auto", "tool_choice": "auto"}, "tool_choice", "older name"),
        ({"messages": [{"role": "assistant", "function_call": 1}]}, "messages", "function.name"),
    ],
)
async def test_what_is_wrong_is_told_in_the_old_names(http, fake, fields, param, says):
    response = await http.post(CHAT, json={"messages": [USER], **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert says in response.json()["error"]["message"]
    assert not fake.added
