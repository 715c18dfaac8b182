"""Tools and thinking over HTTP: what the model is told, and how its answer comes back, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from api.conftest import EOS, FakeClient, make_folder
from tokenizers import AddedToken, Tokenizer

USER = [{"role": "user", "content": "Hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
MISTRAL = (
    "{% for t in tools or [] %}[T]{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.reasoning_content }}"
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS] [{{ c.function.arguments.city }}]{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think></think>{% endif %}{% endif %}"
)
START, END, CALLS = 257, 258, 259  # special tokens of the folder below


def make_thinking_folder(path: Path) -> Path:
    """A model whose markup is special tokens, and whose prompt opens the thinking."""
    make_folder(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<think>", "</think>", "[TOOL_CALLS]", "<rest>")]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": MISTRAL}))
    return path


@pytest.fixture(scope="session")
def thinking_folder(tmp_path_factory) -> Path:
    return make_thinking_folder(tmp_path_factory.mktemp("models") / "thinking")


@pytest.fixture(autouse=True)
def _room(fake) -> None:
    """Tools written out in bytes are long."""
    fake.facts["max_model_len"] = 4096


@pytest.fixture
def thinking(thinking_folder, fake) -> FakeClient:
    """The `fake` that `serve` uses, of the other folder."""
    fake.folder = thinking_folder
    return fake


def says(text: str) -> list[int]:
    return [*text.encode(), EOS]


async def post(http, **body):
    response = await http.post("/v1/chat/completions", json={"messages": USER, **body})
    assert response.status_code == 200, response.text
    return response.json()


def joined(events, index: int = 0) -> dict:
    """What a client makes of a stream: one message, its finish reason and its tokens' log-probabilities."""
    message: dict = {"content": "", "reasoning": "", "reasoning_content": "", "calls": [], "finish": [], "logprobs": []}
    for event in events:
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            for name in ("content", "reasoning", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(message["calls"])
                    assert call["function"]["arguments"] == ""
                    assert call["type"] == "function"
                    message["calls"].append([call["function"]["name"], ""])
                else:
                    assert set(call) == {"index", "function"}
                    assert set(call["function"]) == {"arguments"}
                    message["calls"][call["index"]][1] += call["function"]["arguments"]
            message["finish"] += [choice["finish_reason"]] if choice["finish_reason"] else []
            message["logprobs"] += (choice["logprobs"] or {}).get("content", [])
    return message


@pytest.mark.parametrize("per_step", [1, 3, 1000])
@pytest.mark.parametrize("n", [1, 2])
async def test_calls_whole_and_streamed(http, stream, fake, per_step, n):
    fake.answer = lambda request, index: says(f"Let me see.\n{CALL}\n{NOW}")
    fake.tokens_per_step = per_step
    body = {"tools": TOOLS, "n": n, "logprobs": True}
    answer = await post(http, **body)
    events = await stream("/v1/chat/completions", messages=USER, **body)
    for index, choice in enumerate(answer["choices"]):
        message = choice["message"]
        assert message["content"] == "Let me see."
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        assert calls == [("weather", '{"city": "Zürich"}'), ("now", "{}")]
        assert len({call["id"] for call in message["tool_calls"]}) == 2
        assert choice["finish_reason"] == "tool_calls"
        streamed = joined(events, index)
        assert streamed["content"] == message["content"]
        assert [tuple(call) for call in streamed["calls"]] == calls
        assert streamed["finish"] == ["tool_calls"]
        assert streamed["logprobs"] == choice["logprobs"]["content"]
        assert len(streamed["logprobs"]) == len(says(f"Let me see.\n{CALL}\n{NOW}"))


async def test_content_is_null_beside_calls_alone(http, fake):
    fake.answer = lambda request, index: says(CALL)
    message = (await post(http, tools=TOOLS))["choices"][0]["message"]
    assert message["content"] is None


async def test_a_template_that_reads_no_tools_is_told_of_them(http, fake):
    history = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]  # fmt: skip
    await post(http, messages=history, tools=TOOLS[1:])
    prompt = bytes(fake.added[0].prompt_ids).decode()
    assert prompt.startswith("<system>You can call functions.")
    assert '{"name": "now"}' in prompt
    assert '<assistant><tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n' in prompt
    assert "<user><tool_response>\nnoon\n</tool_response>\n" in prompt


async def test_no_tools_are_told_where_none_may_be_called(http, fake):
    fake.answer = lambda request, index: says(CALL)
    answer = await post(http, tools=TOOLS, tool_choice="none")
    assert "weather" not in bytes(fake.added[0].prompt_ids).decode()
    assert answer["choices"][0]["message"]["content"] == CALL
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_without_tools_markup_is_text(http, fake):
    fake.answer = lambda request, index: says(CALL)
    assert (await post(http))["choices"][0]["message"]["content"] == CALL


async def test_one_call_where_parallel_ones_are_not_wanted(http, stream, fake):
    fake.answer = lambda request, index: says(f"{CALL}{NOW}")
    body = {"tools": TOOLS, "parallel_tool_calls": False}
    (call,) = (await post(http, **body))["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    streamed = joined(await stream("/v1/chat/completions", messages=USER, **body))
    assert [name for name, _ in streamed["calls"]] == ["weather"]


@pytest.mark.parametrize(
    ("choice", "finish", "calls"),
    [("required", "tool_calls", "call){0,15}"), ({"type": "function", "function": {"name": "now"}}, "stop", "call ")],
)
async def test_calls_that_must_be_made_are_a_grammar(http, fake, choice, finish, calls):
    fake.answer = lambda request, index: says(NOW)
    answer = await post(http, tools=TOOLS, tool_choice=choice)
    grammar = fake.added[0].params.grammar
    assert grammar.kind == "lark"
    assert calls in grammar.source.splitlines()[0]
    assert ("weather" in grammar.source) == (choice == "required")
    assert answer["choices"][0]["finish_reason"] == finish
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now"


async def test_a_cut_call_ends_by_its_length(http, stream, fake):
    fake.answer = lambda request, index: says(CALL)
    body = {"tools": TOOLS, "max_tokens": 50}
    (choice,) = (await post(http, **body))["choices"]
    assert choice["finish_reason"] == "length"
    assert '{"city": "Zürich"}'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert joined(await stream("/v1/chat/completions", messages=USER, **body))["finish"] == ["length"]


REFUSED = [
    ({"tools": []}, "tools", "`tools` must not be an empty array"),
    ({"tools": [{"type": "function"}]}, "tools", "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools", "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "tools[0].function.name"),
    ({"tools": [TOOLS[1], TOOLS[1]]}, "tools", "twice"),
    ({"tools": [TOOLS[1]] * 129}, "tools", "at most 128"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]},
        "tools",
        "JSON Schema",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": 7}}}}}]},
        "tools",
        "tools[0].function.parameters.properties.a.type",
    ),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "sometimes"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "does not match any",
    ),
    ({"tool_choice": "required"}, "tool_choice", "`tools` must be set"),
    ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex", "both constrain"),
    ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex", "both constrain"),
    ({"thinking_token_budget": 5}, "thinking_token_budget", "does not mark its thinking"),
    ({"thinking_token_budget": -1}, "thinking_token_budget", "at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED)
async def test_what_is_no_tool_is_refused_by_name(http, fake, fields, param, says):
    response = await http.post("/v1/chat/completions", json={"messages": USER, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert says in response.json()["error"]["message"]
    assert not fake.added


async def test_a_schema_that_no_depth_or_size_bounds_is_refused(http, fake):
    deep: dict = {"type": "string"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}}
    for schema in (deep, {"type": "object", "description": "x" * 70_000}):
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        response = await http.post("/v1/chat/completions", json={"messages": USER, "tools": tools})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"


async def test_json_or_calls(http, fake):
    """A form of the answer beside tools: the grammar lets through either."""
    await post(http, tools=TOOLS, response_format={"type": "json_object"})
    first = fake.added[0].params.grammar.source.splitlines()
    assert first[0].startswith("start: ")
    assert first[1].strip().startswith("| %json")


async def test_thinking_whole_and_streamed(serve, thinking, events):
    thinking.answer = lambda request, index: [
        *b"hm\n",
        END,
        *b"\n\nHi",
        CALLS,
        *b'[{"name": "now", "arguments": {}}]',
        EOS,
    ]
    async with serve() as http:
        answer = await post(http, tools=TOOLS)
        message = answer["choices"][0]["message"]
        assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("hm", "hm", "Hi")
        (call,) = message["tool_calls"]
        assert len(call["id"]) == 9
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4
        body = {"messages": USER, "tools": TOOLS, "stream": True, "logprobs": True}
        usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        found = events((await http.post("/v1/chat/completions", json={**body, **usage})).text)
        streamed = joined(found)
        assert (streamed["reasoning"], streamed["reasoning_content"], streamed["content"]) == ("hm", "hm", "Hi")
        assert streamed["calls"] == [["now", "{}"]]
        assert len(streamed["logprobs"]) == len(thinking.answer(None, 0))
        counts = [event["usage"]["completion_tokens_details"]["reasoning_tokens"] for event in found]
        assert counts == sorted(counts)
        assert counts[-1] == 4
        del body["logprobs"]
        assert "[TOOL_CALLS]" not in (await http.post("/v1/chat/completions", json=body)).text


async def test_thinking_that_is_not_shown_is_counted(serve, thinking):
    thinking.answer = lambda request, index: [*b"hm", END, *b"Hi", EOS]
    async with serve() as http:
        answer = await post(http, include_reasoning=False)
        assert "reasoning" not in answer["choices"][0]["message"]
        assert answer["choices"][0]["message"]["content"] == "Hi"
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


async def test_special_marks_that_are_no_markup_here_are_not_seen(serve, thinking):
    thinking.answer = lambda request, index: [END, *b"a", CALLS, *b"b", END, 260, *b"c", EOS]
    async with serve() as http:
        assert (await post(http, tools=TOOLS))["choices"][0]["message"]["content"] == "abc"
        assert (await post(http))["choices"][0]["message"]["content"] == "abc"


@pytest.mark.parametrize(
    ("fields", "opened"),
    [
        ({}, True),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"messages": [{"role": "user", "content": "What does <think> mean?"}], "reasoning_effort": "none"}, False),
    ],
)
async def test_whether_the_prompt_opens_the_thinking(serve, thinking, fields, opened):
    thinking.answer = lambda request, index: says("hm")
    async with serve() as http:
        message = (await post(http, **fields))["choices"][0]["message"]
        assert message.get("reasoning") == ("hm" if opened else None)
        await post(http, **fields, thinking_token_budget=7)
        wanted = thinking.added[-1].params.thinking
        assert (wanted.start_ids, wanted.end_ids, wanted.budget) == ((START,), (END,), 7)
        assert wanted.opened == opened


@pytest.mark.parametrize(
    ("content", "opened"),
    [
        ("<think>some", True),
        ([{"type": "text", "text": "<think>some"}], True),
        ([{"type": "text", "text": "<think>some"}, {"type": "text", "text": "more"}], True),
        ([{"type": "text", "text": "<think>some</think>"}, {"type": "text", "text": "So"}], False),
        ("<think>some</think>So", False),
    ],
)
async def test_whether_a_message_that_goes_on_is_inside_its_thinking(serve, thinking, content, opened):
    thinking.answer = lambda request, index: says("hm")
    messages = [*USER, {"role": "assistant", "content": content}]
    async with serve() as http:
        answer = await post(http, messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert answer["choices"][0]["message"].get("reasoning") == ("hm" if opened else None)


async def test_a_grammar_waits_for_the_end_of_the_thinking(serve, thinking):
    async with serve() as http:
        await post(http, guided_regex="[a-z]+")
        await post(http)
    assert [request.params.thinking is not None for request in thinking.added] == [True, False]


async def test_messages_carry_calls_and_thinking_in(serve, thinking):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    async with serve() as http:
        for name in ("reasoning", "reasoning_content"):
            said = {"role": "assistant", "content": None, name: "thought", "tool_calls": [call]}
            await post(http, messages=[*USER, said, {"role": "tool", "tool_call_id": "abcdefghi", "content": "hot"}])
    prompts = [bytes(i for i in request.prompt_ids if i < 256).decode() for request in thinking.added]
    assert prompts[0] == prompts[1]
    assert "<assistant>thought [Rome]<tool>hot" in prompts[0]


async def test_options_name_the_syntax_or_switch_it_off(serve, fake):
    fake.answer = lambda request, index: says("[TOOL_CALLS]now{}")
    async with serve(tool_call_parser="mistral") as http:
        assert (await post(http, tools=TOOLS))["choices"][0]["message"]["tool_calls"]
    fake.answer = lambda request, index: says("hm</think>Hi")
    async with serve(reasoning_parser="deepseek_r1") as http:
        assert (await post(http))["choices"][0]["message"]["reasoning"] == "hm"
    async with serve(tool_call_parser="none") as http:
        response = await http.post("/v1/chat/completions", json={"messages": USER, "tools": TOOLS})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert "--tool-call-parser" in response.json()["error"]["message"]
    for name in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ValueError, match=name):
            async with serve(**{name: "unheard"}):
                pass


async def test_tokenizing_counts_the_tools_too(http):
    bare, told = [
        (await http.post("/tokenize", json={"messages": USER, **extra})).json()["count"]
        for extra in ({}, {"tools": TOOLS})
    ]
    assert told > bare + 100
