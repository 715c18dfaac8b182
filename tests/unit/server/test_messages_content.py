"""Messages of /v1/messages as messages of a chat."""

from __future__ import annotations

import pytest

from quire.server.messages.content import messages_of


def text(*texts):
    return [{"type": "text", "text": text} for text in texts]


USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": "é"}}
CALL = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
CASES = {
    "text": ([{"role": "user", "content": "Hi"}], None, [{"role": "user", "content": text("Hi")}]),
    "system": (
        [{"role": "user", "content": text("a", "b")}],
        [{"type": "text", "text": "Rules.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "More."}],
        [{"role": "system", "content": text("Rules.", "More.")}, {"role": "user", "content": text("a", "b")}],
    ),
    "a system text": (
        [{"role": "user", "content": "Hi"}],
        "Rules.",
        [{"role": "system", "content": text("Rules.")}, {"role": "user", "content": text("Hi")}],
    ),
    "thinking, text and a call": (
        [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "abc"},
                    {"type": "redacted_thinking", "data": "xyz"},
                    *text("So:"),
                    USE,
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "3", "is_error": False},
                    {"type": "tool_result", "tool_use_id": "t2", "content": text("4", "5")},
                    {"type": "tool_result", "tool_use_id": "t3"},
                    *text("And now?", "Well?"),
                ],
            },
        ],
        None,
        [
            {"role": "user", "content": text("Hi")},
            {"role": "assistant", "content": text("So:"), "tool_calls": [CALL], "reasoning": "hm"},
            {"role": "tool", "tool_call_id": "t1", "content": text("3")},
            {"role": "tool", "tool_call_id": "t2", "content": text("4", "5")},
            {"role": "tool", "tool_call_id": "t3", "content": []},
            {"role": "user", "content": text("And now?", "Well?")},
        ],
    ),
    "turns of one role": (
        [
            {"role": "user", "content": "one"},
            {"role": "user", "content": text("two")},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "a", "signature": ""}, *text("x")]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "b", "signature": ""}, *text("y"), USE]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "3"}]},
            {"role": "user", "content": "three"},
            {"role": "user", "content": []},
        ],
        None,
        [
            {"role": "user", "content": text("one", "two")},
            {"role": "assistant", "content": text("x", "y"), "tool_calls": [CALL], "reasoning": "a\nb"},
            {"role": "tool", "tool_call_id": "t1", "content": text("3")},
            {"role": "user", "content": text("three")},
        ],
    ),
    "system messages": (
        [
            {"role": "system", "content": "More."},
            {"role": "user", "content": "Hi"},
            {"role": "system", "content": text("From", "now on"), "clear_at": "never"},
            {"role": "user", "content": "Go on"},
        ],
        "Rules.",
        [
            {"role": "system", "content": text("Rules.", "More.")},
            {"role": "user", "content": text("Hi")},
            {"role": "system", "content": text("From", "now on")},
            {"role": "user", "content": text("Go on")},
        ],
    ),
    "an answer that has not begun": (
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text("")}],
        None,
        [{"role": "user", "content": text("Hi")}],
    ),
    "one that has begun with thinking": (
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}]},
        ],
        None,
        [{"role": "user", "content": text("Hi")}, {"role": "assistant", "content": [], "reasoning": "hm"}],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_messages(case):
    given, system, expected = CASES[case]
    assert messages_of(given, system) == expected
