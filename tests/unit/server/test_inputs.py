"""What a request asks for, as far as its fields tell."""

from __future__ import annotations

import pytest

from quire.server.inputs import chat_size
from quire.server.protocol import ChatBody

USER = {"role": "user", "content": "é" * 50}
TOOL = {"type": "function", "function": {"name": "f", "description": "x" * 1000, "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "y" * 2000}}


def size(*messages, **fields):
    return chat_size(ChatBody(messages=list(messages), **fields)).prompt_bytes


def test_a_text_counts_by_its_bytes():
    assert size(USER) == 100
    assert size({"role": "user", "content": [{"type": "text", "text": "abc"}, {"type": "image"}, 7]}) == 3
    assert size({"role": "user", "content": None}) == 0


@pytest.mark.parametrize(
    ("messages", "fields", "least"),
    [
        ([USER], {"tools": [TOOL]}, 1100),
        ([USER], {"tools": [TOOL] * 10}, 10_100),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}], {}, 4100),
    ],
)
def test_tools_and_calls_are_a_part_of_the_prompt(messages, fields, least):
    assert least <= size(*messages, **fields) < 1.2 * least


def test_what_is_nested_too_deeply_is_left_to_whoever_reads_it():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"deep": deep}}}
    body = ChatBody.model_construct(messages=[USER], tools=[tool], n=None, logprobs=None, prompt_logprobs=None)
    assert chat_size(body).prompt_bytes == 100
