"""litellm, LangChain, instructor and pydantic-ai against a real server; each is skipped where it is not installed."""

from __future__ import annotations

from typing import Literal

import pytest
from api.clients.served import KEY, served
from pydantic import BaseModel

# What their makers warn each other of is not ours to judge.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

MESSAGES = [{"role": "user", "content": "Hi"}]
TOO_LONG = [{"role": "user", "content": "x" * 5000}]


class Ticket(BaseModel):
    """A ticket."""

    urgent: bool
    team: Literal["billing", "technical"]


@pytest.fixture(scope="module")
def base_url(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served")) as server:
        yield f"{server.url}/v1"


def test_litellm(base_url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network for prices
    litellm = pytest.importorskip("litellm")
    common = {"model": "hosted_vllm/tiny", "api_base": base_url, "api_key": KEY}
    answer = litellm.completion(messages=MESSAGES, max_tokens=8, **common)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8, "temperature": 0}
    *_, last = litellm.completion(messages=MESSAGES, **options, **common)
    assert last.usage.completion_tokens == 8
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=TOO_LONG, max_tokens=8, **common)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=MESSAGES, **(common | {"api_key": "wrong"}))


def test_langchain(base_url):
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(base_url=base_url, api_key=KEY, model="tiny", stream_usage=True, max_tokens=200, seed=1)
    answer = model.invoke("Hi")
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = list(model.stream("Hi"))
    assert sum(piece.usage_metadata["total_tokens"] for piece in pieces if piece.usage_metadata) > 0
    assert isinstance(model.with_structured_output(Ticket, method="json_schema").invoke("Hi"), Ticket)
    assert isinstance(model.with_structured_output(Ticket, method="function_calling").invoke("Hi"), Ticket)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(base_url, mode):
    instructor = pytest.importorskip("instructor")
    openai = pytest.importorskip("openai")
    client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key=KEY), mode=instructor.Mode[mode])
    ticket = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_model=Ticket, max_tokens=200, max_retries=0, seed=1
    )
    assert isinstance(ticket, Ticket)


def test_pydantic_ai(base_url):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=base_url, api_key=KEY))
    agent = pydantic_ai.Agent(model, output_type=Ticket, model_settings={"max_tokens": 300, "seed": 1})
    result = agent.run_sync("Hi")
    assert isinstance(result.output, Ticket)
    assert result.usage.output_tokens > 0
