"""Anthropic's client on /v1/messages: what an agent does with it."""

from __future__ import annotations

import anthropic
import pytest

EOS = 256
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call>'
NUMBERS = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}
TOOLS = [{"name": "add", "description": "adds", "input_schema": NUMBERS}]
HI = {"model": "tiny", "max_tokens": 1000, "messages": [{"role": "user", "content": "Hi"}]}
THINK = {"type": "adaptive"}


@pytest.fixture
def client(url):
    """Its key goes in x-api-key."""
    with anthropic.Anthropic(base_url=url, api_key="right", max_retries=0, timeout=60) as client:
        yield client


def says(fake, *answers):
    """The answers of the requests to come, one each."""
    left = list(answers)
    fake.answer = lambda request, index: [*left.pop(0).encode(), EOS]


def test_create(client, fake):
    says(fake, "Hello, world!")
    message = client.messages.create(**HI, system="Be brief.", metadata={"user_id": "u"})
    assert message.content[0].text == "Hello, world!"
    assert message.id == f"msg_{message._request_id}"
    assert (message.stop_reason, message.role, message.model) == ("end_turn", "assistant", "tiny")
    assert message.usage.input_tokens == len(b"<system>Be brief.\n<user>Hi\n<assistant>")
    type(message).model_validate_json(message.model_dump_json())


def test_a_bearer_token(url, fake):
    says(fake, "Hello")
    with anthropic.Anthropic(base_url=url, auth_token="right", max_retries=0, timeout=60) as client:
        assert client.messages.create(**HI).content[0].text == "Hello"


def test_stream(client, fake):
    says(fake, "<think>hm</think>Hello, world!")
    with client.messages.stream(**HI, thinking=THINK) as stream:
        events = list(stream)
        message = stream.get_final_message()
    assert "".join(event.text for event in events if event.type == "text") == "Hello, world!"
    assert "".join(event.thinking for event in events if event.type == "thinking") == "hm"
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == len("<think>hm</think>Hello, world!") + 1


def test_stream_is_create(client, fake):
    answer = f"<think>hm</think>Well. {CALL}\n{CALL}"
    says(fake, answer, answer)
    whole = client.messages.create(**HI, tools=TOOLS, thinking=THINK)
    with client.messages.stream(**HI, tools=TOOLS, thinking=THINK) as stream:
        streamed = stream.get_final_message()
    ids = {"id": True, "content": {"__all__": {"id"}}}
    assert streamed.model_dump(exclude=ids, warnings=False) == whole.model_dump(exclude=ids, warnings=False)


@pytest.mark.parametrize("cut", range(20, 70, 7))
def test_arguments_cut_off_anywhere_read_the_same(client, fake, cut):
    answer = '<tool_call>{"name": "add", "arguments": {"a": "xy", "b": [1, {"c": true}], "d": "\\u00e9"}}</tool_call>'
    says(fake, answer, answer)
    asked = {**HI, "tools": TOOLS, "max_tokens": cut}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert whole.stop_reason == streamed.stop_reason == "max_tokens"
    assert [getattr(block, "input", None) for block in whole.content] == [
        getattr(block, "input", None) for block in streamed.content
    ]


def test_an_agents_two_turns(client, fake):
    says(fake, f"<think>sum</think>Let me add. {CALL}", "It is 3.")
    conversation = [{"role": "user", "content": "1 + 2?"}]
    asked = {"model": "tiny", "max_tokens": 200, "tools": TOOLS, "thinking": THINK}
    first = client.messages.create(**asked, messages=conversation)
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("add", {"x": 1, "y": 2})
    conversation.append({"role": "assistant", "content": [block.model_dump() for block in first.content]})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
    conversation.append({"role": "user", "content": [result]})
    second = client.messages.create(**asked, messages=conversation)
    assert second.content[0].text == "It is 3."
    prompt = bytes(fake.added[1].prompt_ids).decode()
    assert '<assistant>Let me add.\n<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call>' in prompt
    assert prompt.index("<tool_response>\n3\n</tool_response>") > prompt.index("Let me add.")


def test_a_schema_is_kept_to(client, fake):
    """The scripted engine minds no grammar: what matters here is that it was given one."""
    says(fake, '{"x": 3}')
    schema = {**NUMBERS, "additionalProperties": False}
    client.messages.create(**HI, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert fake.added[0].params.grammar is not None


def test_a_conversation_as_the_client_types_it(client, fake):
    says(fake, "Hello")
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "again"}]},
        {"role": "assistant", "content": "He"},
    ]
    client.messages.create(**{**HI, "messages": conversation}, system="Rules.")
    assert bytes(fake.added[0].prompt_ids) == b"<system>Rules.\nBe brief.\n<user>Hi\nagain\n<assistant>He"


def test_a_request_that_is_out_of_time_is_sent_once(client, fake):
    fake.gate.clear()
    with pytest.raises(anthropic.APIStatusError) as failure:
        client.with_options(max_retries=2).messages.create(**HI, extra_body={"timeout": 0.05})
    assert failure.value.status_code == 504
    assert len(fake.added) == 1


def test_count_tokens(client, fake):
    says(fake, "x")
    asked = {"model": "tiny", "messages": HI["messages"], "tools": TOOLS, "system": "Be brief."}
    counted = client.messages.count_tokens(**asked).input_tokens
    assert counted == client.messages.create(**asked, max_tokens=5).usage.input_tokens


def test_errors(client):
    with pytest.raises(anthropic.BadRequestError) as refusal:
        client.messages.create(**{**HI, "max_tokens": 0})
    assert refusal.value.body["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in refusal.value.message
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**HI, "model": "nope"})
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**HI)


def test_a_failure_in_the_middle(client, fake):
    fake.answer = lambda request, index: [46] * 1000
    fake.step_seconds = 0.002
    with client.messages.stream(**HI) as stream:
        assert next(stream.text_stream) == "."
        fake.fail_request = "planned"
        with pytest.raises(anthropic.APIStatusError) as failure:
            stream.until_done()
    assert failure.value.body["error"]["type"] == "api_error"


def test_a_client_that_leaves_ends_its_request(client, fake, until):
    fake.answer = lambda request, index: [46] * 1000
    fake.step_seconds = 0.005
    with client.messages.stream(**HI) as stream:
        next(iter(stream))
    until(lambda: fake.aborted == [fake.added[0].request_id])
