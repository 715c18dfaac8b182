"""OpenAI's client on /v1/responses: what an agent does with it."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest

EOS = 256
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call>'
NUMBERS = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}
TOOLS = [{"type": "function", "name": "add", "description": "adds", "parameters": NUMBERS, "strict": False}]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0, timeout=60) as client:
        yield client


def says(fake, *answers):
    """The answers of the requests to come, one each."""
    left = list(answers)
    fake.answer = lambda request, index: [*left.pop(0).encode(), EOS]


def test_create(client, fake):
    says(fake, "Hello, world!")
    response = client.responses.create(model="tiny", input="Hi", metadata={"a": "b"})
    assert response.output_text == "Hello, world!"
    assert (response.status, response.metadata, response.error) == ("completed", {"a": "b"}, None)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 0
    type(response).model_validate_json(response.model_dump_json())


def test_stream(client, fake):
    says(fake, "<think>hm</think>Hello, world!")
    with client.responses.stream(model="tiny", input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "Hello, world!"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello, world!"
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "hm"
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert events[-1].type == "response.completed"


def test_events_are_those_that_the_client_has_types_for(client, fake):
    says(fake, f"<think>hm</think>Well. {CALL}")
    for event in client.responses.create(model="tiny", input="Hi", tools=TOOLS, stream=True):
        type(event).model_validate_json(event.model_dump_json(), strict=False)
        assert type(event) is not pydantic.BaseModel
        assert event.type.startswith("response.")


def test_an_agents_two_turns(client, fake):
    says(fake, f"<think>sum</think>Let me add. {CALL}", "It is 3.")
    conversation = [{"role": "user", "content": "1 + 2?"}]
    first = client.responses.create(model="tiny", input=conversation, tools=TOOLS, store=False)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("add", {"x": 1, "y": 2})
    conversation += [item.model_dump() for item in first.output]
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "3"})
    second = client.responses.create(model="tiny", input=conversation, tools=TOOLS, store=False)
    assert second.output_text == "It is 3."
    prompt = bytes(fake.added[1].prompt_ids).decode()
    assert '<assistant>Let me add.\n<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call>' in prompt
    assert prompt.index("<tool_response>\n3\n</tool_response>") > prompt.index("Let me add.")


def test_streamed_arguments(client, fake):
    says(fake, CALL)
    with client.responses.stream(model="tiny", input="Hi", tools=TOOLS) as stream:
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                snapshot = event.snapshot
        (call,) = stream.get_final_response().output
    assert json.loads(call.arguments) == json.loads(snapshot) == {"x": 1, "y": 2}


def test_a_schema_is_kept_to(client, fake):
    """The scripted engine minds no grammar: what matters here is which one it was given."""

    class Sum(pydantic.BaseModel):
        x: int

    says(fake, '{"x": 3}')
    response = client.responses.parse(model="tiny", input="Hi", text_format=Sum)
    assert response.output_parsed == Sum(x=3)
    assert fake.added[0].params.grammar is not None


def test_incomplete(client, fake):
    says(fake, "Hello", "Hello")
    response = client.responses.create(model="tiny", input="Hi", max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    *_, last = client.responses.create(model="tiny", input="Hi", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output_text == "Hel"


def test_errors(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model="tiny", input="Hi", previous_response_id="resp_1")
    assert refusal.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nope", input="Hi")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").responses.create(model="tiny", input="Hi")


def test_a_failure_in_the_middle(client, fake):
    fake.answer = lambda request, index: [46] * 2000
    fake.step_seconds = 0.002
    with client.responses.create(model="tiny", input="Hi", stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                fake.fail_request = "planned"
    assert event.type == "response.failed"
    assert event.response.error.code == "engine_error"


def test_a_client_that_leaves_ends_its_request(client, fake, until):
    fake.answer = lambda request, index: [46] * 2000
    fake.step_seconds = 0.002
    with client.responses.create(model="tiny", input="Hi", stream=True) as stream:
        next(iter(stream))
    until(lambda: fake.aborted == [fake.added[0].request_id])
