"""Items of /v1/responses as messages of a chat."""

from __future__ import annotations

import pytest

from quire.engine.errors import TooLongError
from quire.server.responses.items import messages_of
from quire.server.responses.truncation import longest_that_fits


def text(*texts):
    return [{"type": "text", "text": text} for text in texts]


def call(call_id, name="f", arguments="{}"):
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def chat_call(call_id, name="f", arguments="{}"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def output(call_id, result):
    return {"type": "function_call_output", "call_id": call_id, "output": result}


def user(content):
    return {"role": "user", "content": content}


CASES = {
    "text alone": ("Hi", None, [{"role": "user", "content": text("Hi")}]),
    "instructions": (
        [user("Hi")],
        "Rules.",
        [{"role": "system", "content": text("Rules.")}, {"role": "user", "content": text("Hi")}],
    ),
    "a developer's message behind instructions is one with them, a later one is not": (
        [{"role": "developer", "content": "More."}, user("Hi"), {"role": "developer", "content": "Late."}],
        "Rules.",
        [
            {"role": "system", "content": text("Rules.", "More.")},
            {"role": "user", "content": text("Hi")},
            {"role": "developer", "content": text("Late.")},
        ],
    ),
    "without instructions roles stay": (
        [{"role": "developer", "content": "More."}, user("Hi")],
        None,
        [{"role": "developer", "content": text("More.")}, {"role": "user", "content": text("Hi")}],
    ),
    "parts": (
        [
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}],
            }
        ],
        None,
        [{"role": "user", "content": text("a", "b")}],
    ),
    "a turn of an assistant is one message": (
        [
            user("Add."),
            {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "So:", "annotations": []}]},
            call("c1"),
            call("c2", "g", '{"x": 1}'),
            output("c1", "one"),
            output("c2", [{"type": "input_text", "text": "two"}]),
            {"type": "message", "role": "assistant", "content": "Done."},
            user("Thanks."),
        ],
        None,
        [
            {"role": "user", "content": text("Add.")},
            {
                "role": "assistant",
                "content": text("So:"),
                "reasoning": "hm",
                "tool_calls": [chat_call("c1"), chat_call("c2", "g", '{"x": 1}')],
            },
            {"role": "tool", "tool_call_id": "c1", "content": text("one")},
            {"role": "tool", "tool_call_id": "c2", "content": text("two")},
            {"role": "assistant", "content": text("Done.")},
            {"role": "user", "content": text("Thanks.")},
        ],
    ),
    "calls one after another are turns of their own": (
        [user("x"), call("c1"), output("c1", "1"), call("c2"), output("c2", "2")],
        None,
        [
            {"role": "user", "content": text("x")},
            {"role": "assistant", "content": [], "tool_calls": [chat_call("c1")]},
            {"role": "tool", "tool_call_id": "c1", "content": text("1")},
            {"role": "assistant", "content": [], "tool_calls": [chat_call("c2")]},
            {"role": "tool", "tool_call_id": "c2", "content": text("2")},
        ],
    ),
    "thinking that nobody here can read": (
        [user("x"), {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}, call("c1")],
        None,
        [
            {"role": "user", "content": text("x")},
            {"role": "assistant", "content": [], "tool_calls": [chat_call("c1")]},
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_items_are_messages(case):
    given, instructions, expected = CASES[case]
    assert messages_of(given, instructions) == expected


def conversation(turns):
    return [
        {"role": "system", "content": "s"},
        *({"role": role, "content": str(i)} for i in range(turns) for role in ("user", "assistant", "tool")),
        {"role": "user", "content": "last"},
    ]


@pytest.mark.parametrize("room", range(1, 40))
def test_the_longest_tail_that_fits(room):
    messages, tried = conversation(10), []

    def prepare(left):
        tried.append(left)
        if len(left) > room:
            raise TooLongError("too long", "prompt")
        return left

    if room < 2:
        with pytest.raises(TooLongError):
            longest_that_fits(messages, prepare)
        return
    left = longest_that_fits(messages, prepare)
    assert left == messages or (left[0], left[1]["role"], left[1:]) == (messages[0], "user", messages[-len(left) + 1 :])
    assert len(left) == len(messages) or len(left) + 3 > room, "one turn more would not fit"
    assert len(tried) <= 6
