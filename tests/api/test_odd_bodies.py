"""Bodies with something odd in any place, or deep: an answer or a refusal, never a 5xx."""

from __future__ import annotations

import copy

import pytest

from quire.engine.chat import MAX_DEPTH
from quire.server import routing

ODD = [None, True, -1, 0, 1.5, 2**63 - 1, 1e308, "", "x", "\ufffe", [], ["x"], [[]], {}, {"type": "x"}, {"a": None}]
RESPONSES = {
    "model": "tiny",
    "instructions": "i",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "b"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "d"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}],
    "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "reasoning": {"effort": None, "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
    "max_output_tokens": 3,
    "parallel_tool_calls": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "truncation": "disabled",
    "stream": False,
    "stop": ["x"],
    "seed": 1,
    "chat_template_kwargs": {},
}
MESSAGES = {
    "model": "tiny",
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "b", "signature": ""},
                {"type": "text", "text": "t"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "d"}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {"x": {}}}}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "adaptive", "budget_tokens": None},
    "output_config": {"effort": "low", "format": None},
    "output_format": None,
    "chat_template_kwargs": {},
    "metadata": {"user_id": "u"},
    "stop_sequences": ["x"],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "stream": False,
}
BODIES = {"/v1/responses": RESPONSES, "/v1/messages": MESSAGES, "/v1/messages/count_tokens": MESSAGES}


def places(value, path=()):
    """Of everything inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(body, path, value):
    body = copy.deepcopy(body)
    node = body
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return body


@pytest.mark.parametrize("path", BODIES)
async def test_something_odd_in_any_place(serve, fake, path):
    fake.facts = {"max_model_len": 2048}
    statuses = set()
    async with serve() as http:
        for place in places(BODIES[path]):
            for odd in ODD:
                response = await http.post(path, json=replaced(BODIES[path], place, odd))
                assert response.status_code in (200, 400, 404), (place, odd, response.text)
                if response.status_code != 200:
                    assert response.json()["error"]["message"]
                    assert fake.running == 0
                statuses.add(response.status_code)
    assert statuses == {200, 400, 404}, "the table must hold good and bad ones"


def deep_bodies(deep):
    """Text of bodies with `deep` where content, arguments and schemas go."""
    use = f'{{"type":"tool_use","id":"c","name":"f","input":{{"x":{deep}}}}}'
    call = f'{{"type":"function_call","call_id":"c","name":"f","arguments":"{deep}"}}'
    schema = f'"name":"f","parameters":{{"x":{deep}}},"input_schema":{{"x":{deep}}}'
    user = '{"role":"user","content":"x"}'
    yield f'"input":{deep},"messages":[{{"role":"user","content":{deep}}}]'
    yield f'"input":[{call}],"messages":[{{"role":"assistant","content":[{use}]}},{user}]'
    yield f'"input":"x","tools":[{{"type":"function",{schema}}}]'
    yield f'"messages":[{user}],"tools":[{{{schema}}}]'


@pytest.mark.parametrize("path", BODIES)
async def test_something_deep(http, path):
    """Depths up to what the decoder itself refuses: an encoder that starts deeper in the stack gives up sooner."""
    for depth in [MAX_DEPTH, MAX_DEPTH + 1, 100, *range(500, 1100, 3)]:
        for fields in deep_bodies("[" * depth + "]" * depth):
            content = f'{{"max_tokens":3,{fields}}}'
            response = await http.post(path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400), (depth, fields[:40], response.text)


def deep_forms(deep):
    """Route and fields: JSON that the server writes out again, as a schema or as what is asked about."""
    tag = f'{{"structures":[{{"begin":"<f>","schema":{deep},"end":"</f>"}}],"triggers":["<f"]}}'
    schema = f'{{"type":"json_schema","schema":{deep}}}'
    part = f'{{"type":"input_json","data":{deep}}}'
    question = f'{{"type":"predicate","instructions":[{part}]}}'
    user = '{"role":"user","content":"x"}'
    yield "/v1/completions", f'"prompt":"x","guided_json":{deep}'
    yield "/v1/completions", f'"prompt":"x","structured_outputs":{{"structural_tag":{tag}}}'
    yield "/v1/completions", f'"prompt":"x","response_format":{{"type":"json_schema","json_schema":{schema}}}'
    yield "/v1/messages", f'"messages":[{user}],"output_format":{schema}'
    yield "/v1/responses", f'"input":"x","text":{{"format":{schema}}}'
    yield "/v1/decisions", f'"input":[{{"role":"user","content":[{part}]}}],"questions":[{question}]'
    yield "/v1/decisions", f'"input":"x","questions":[{question}]'


async def test_something_deep_in_a_large_body(http):
    """One that a text thread decodes, higher up in its stack than where the fields are read."""
    padding = " " * routing.LARGE_BODY_BYTES
    for depth in range(900, 1030, 3):
        for path, fields in deep_forms('{"a":' * depth + "1" + "}" * depth):
            content = f'{{"max_tokens":3,{padding}{fields}}}'
            response = await http.post(path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400), (depth, fields[:40], response.text)
