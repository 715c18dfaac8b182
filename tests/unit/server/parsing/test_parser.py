"""The parser of answers: what each syntax says, whatever the pieces in which it comes."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.server.parsing.spelled import ALL, check_order, parser, pieces, read, said, spell

from quire.server.parsing.reading import fold
from quire.server.parsing.syntaxes import SYNTAXES, TAGS, Syntax

SYNTAX = pytest.mark.parametrize("syntax", ALL, ids=lambda syntax: syntax.name)
PARIS = ("get_weather", {"city": "Paris", "days": 3})
ODD = {
    "city": 'Zoë\'s "city" \\ {[<tool_call>]} </tool_call> \n\ttab\u2028 漢字 😀',
    "parts": ["]", "}", '"', "\\", "a)"],
    "where": {"deep": {"er": [{"x": None}, True, -1.5e-7]}},
}


def arguments(message) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


@SYNTAX
@pytest.mark.parametrize(
    "calls",
    [[PARIS], [("now", {})], [PARIS, ("now", {})], [("now", {}), PARIS, PARIS], [("get_weather", ODD), PARIS]],
    ids=["one", "empty", "two", "three", "odd"],
)
def test_calls_come_out_as_they_were_meant(syntax, calls):
    message = read(parser(syntax), [spell(syntax, calls)])
    assert arguments(message) == calls
    assert message.content == ""
    assert len({call.id for call in message.calls}) == len(calls)
    if syntax.make_id.__name__ == "short_id":
        assert all(len(call.id) == 9 and call.id.isalnum() for call in message.calls)
    else:
        assert all(call.id.startswith("call_") for call in message.calls)


@SYNTAX
def test_text_before_a_call_is_content_without_the_space_between(syntax):
    if syntax.bare:
        text = next(iter(syntax.bodies)) + spell(syntax, [PARIS])
    else:
        text = spell(syntax, [PARIS])
    message = read(parser(syntax), [f"I look it up.\n\n{text}\n"])
    assert message.content == "I look it up."
    assert arguments(message) == [PARIS]


@SYNTAX
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Hello, world!\n",
        "  indented { [ < brackets\n\n",
        '{"name": "Bob", "age": 3}',
        '{"city": "Paris"}',
        "[1, 2, 3]",
        "[see](http://x) f(x)",
        "<tool_cal",
        "[TOOL_CALL",
        "a < b and b > c [sic]",
    ],
)
def test_text_without_calls_is_content_to_the_letter(syntax, text):
    assert said(read(parser(syntax), [text])) == (text, "", [])
    assert said(read(parser(syntax), text)) == (text, "", [])


@SYNTAX
def test_markup_that_begins_no_call_is_text(syntax):
    mark = next(iter(syntax.bodies))
    for text in (f"The mark {mark} is special.", f"{mark}", f"{mark}\n{mark}", f"{mark} {{"):
        assert said(read(parser(syntax), [text]))[0] == text
        assert not read(parser(syntax), [text]).calls


@SYNTAX
def test_a_special_mark_that_begins_no_call_is_not_seen(syntax):
    mark = next(iter(syntax.bodies))
    message = read(parser(syntax, hidden=frozenset(syntax.marks)), [f"The mark {mark} is special."])
    assert message.content == "The markis special."


@SYNTAX
@pytest.mark.parametrize("calls", [[PARIS], [("get_weather", ODD)], [PARIS, PARIS]], ids=["one", "odd", "two"])
def test_a_cut_answer_gives_what_there_was(syntax, calls):
    text = spell(syntax, calls)
    whole = [call.arguments for call in read(parser(syntax), [text]).calls]
    for end in range(len(text)):
        message = read(parser(syntax), [text[:end]])
        assert len(message.calls) <= len(calls)
        for call, complete in zip(message.calls, whole, strict=False):
            begun = call.arguments
            if syntax.spelling.arguments == "tags" and not complete.startswith(begun):
                begun = begun[: begun.rindex("<")].removesuffix("\\n")  # a torn tag is text as far as anybody knows
            assert complete.startswith(begun)


@SYNTAX
def test_arguments_are_streamed(syntax):
    """Long before the call is complete; only what has to be understood first waits."""
    text = spell(syntax, [("get_weather", {"city": "x" * 1000})])
    reader = parser(syntax)
    seen = [sum(len(getattr(piece, "text", "")) for piece in reader.push(char)) for char in text]
    assert sum(map(bool, seen)) > 990


# The pieces of which strange answers are made: markup whole and torn, values, text.
def _fragments(syntax: Syntax) -> list[str]:
    whole = [spell(syntax, [PARIS]), spell(syntax, [("get_weather", ODD), ("now", {})])]
    marks = [*syntax.marks, "<think>", "</think>"]
    parts = [mark[:i] for mark in marks for i in (1, len(mark) // 2)]
    tokens = [
        *"{}[](),:;\"'\\<>=",
        " ",
        "\n",
        "\n\n",
        "é",
        "😀",
        "null",
        "-1",
        "True",
        '{"name": "now"',
        "now(",
        "[now(",
    ]
    more = [
        '"arguments": ',
        "[ARGS]",
        "<function=now>",
        "<parameter=city>\n",
        "\n</parameter>",
        "</function>",
        "```json\n",
    ]
    return [*whole, *marks, *parts, *tokens, *more, "Some text. ", '"\\ud83d', "\\u12", "<｜tool▁sep｜>"]


@st.composite
def _answers(draw: st.DrawFn) -> tuple[Syntax, str, list[int]]:
    syntax = draw(st.sampled_from(ALL))
    text = "".join(draw(st.lists(st.sampled_from(_fragments(syntax)) | st.text(max_size=5), max_size=12)))
    return syntax, text, sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))


@given(answer=_answers(), tags=st.sampled_from([None, *TAGS]), opened=st.booleans(), hidden=st.booleans())
@settings(max_examples=600, deadline=None)
def test_where_it_is_cut_makes_no_difference(answer, tags, opened, hidden):
    syntax, text, cuts = answer

    def new():
        return parser(syntax, tags=tags, opened=opened, hidden=frozenset(syntax.marks) if hidden else frozenset())

    first, second, third = new(), new(), new()
    whole = pieces(first, [text])
    check_order(whole)
    parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    expected = said(read(new(), [text]))
    in_parts, by_character = pieces(second, parts), pieces(third, text)
    check_order(in_parts)
    check_order(by_character)
    for found in (in_parts, by_character):
        assert said(fold(found)) == expected
    assert first.reasoning_chars == second.reasoning_chars == third.reasoning_chars <= len(text)


@SYNTAX
def test_every_split_in_two_of_a_long_answer(syntax):
    mark = "" if not syntax.bare else next(iter(syntax.bodies))
    text = f"<think>\nLet me see.\n</think>\n\nSure: {mark}{spell(syntax, [('get_weather', ODD), PARIS])}\n"
    expected = said(read(parser(syntax, tags="qwen3"), [text]))
    assert expected[:2] == ("Sure:", "Let me see.")
    assert len(expected[2]) == 2
    for cut in range(len(text)):
        assert said(read(parser(syntax, tags="qwen3"), [text[:cut], text[cut:]])) == expected


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(
    syntax=st.sampled_from(ALL),
    calls=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "city": st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
                "days": st.integers(-(2**70), 2**70),
                "ratio": st.floats(allow_nan=False, allow_infinity=False),
                "where": st.dictionaries(st.text(alphabet="ab'\"\\{}é", max_size=4), _VALUES, max_size=3),
                "parts": st.lists(st.text(max_size=5), max_size=3),
            },
        ),
        min_size=1,
        max_size=3,
    ),
    ascii_only=st.booleans(),
    step=st.integers(1, 9),
)
@settings(max_examples=400, deadline=None)
def test_any_arguments_survive(syntax, calls, ascii_only, step):
    wanted = [("get_weather", values) for values in calls]
    text = spell(syntax, wanted, ascii_only=ascii_only)
    if syntax.spelling.arguments == "tags" and "</parameter>" in text.replace("\n</parameter>\n", ""):
        return  # a value that holds the end of a value cannot be told from it
    message = read(parser(syntax), [text[i : i + step] for i in range(0, len(text), step)])
    assert arguments(message) == wanted


# What some models write, though it is not quite what their template shows.
LOOSE = [
    ("hermes", '<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call>', [{"city": "Rome"}]),
    ("hermes", '<tool_call>{"name":"get_weather","arguments":"{\\"city\\": \\"Rome\\"}"}</tool_call>',
     [{"city": "Rome"}]),
    ("hermes", '<tool_call>\n[{"name": "now", "arguments": {}}, {"name": "now"}]\n</tool_call>', [{}, {}]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [{}]),
    ("hermes", '<tool_call>{"id": 7, "type": "function", "name": "now", "parameters": {}}', [{}]),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb\tc"}}', [{"city": "a\nb\tc"}]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}}}\n</tool_call>', [{}]),
    ("qwen3_coder", "<function=get_weather>\n<parameter=city>Rome</parameter></function>", [{"city": "Rome"}]),
    ("qwen3_coder", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', [{}]),
    ("qwen3_coder", "<tool_call><function=get_weather><parameter=exact>\nTrue\n</parameter></function></tool_call>",
     [{"exact": True}]),
    ("qwen3_coder", "<tool_call><function=get_weather><parameter=days>\nthree\n</parameter></function></tool_call>",
     [{"days": "three"}]),
    ("qwen3_coder", "<tool_call><function=get_weather><parameter=note>\nnull\n</parameter></function></tool_call>",
     [{"note": None}]),
    ("qwen3_coder", "<tool_call><function=other><parameter=x>\n12\n</parameter></function></tool_call>", [{"x": "12"}]),
    ("mistral", '[TOOL_CALLS]{"name": "now", "arguments": {}}', [{}]),
    ("mistral", '[TOOL_CALLS]now{"a": 1}[TOOL_CALLS]now[CALL_ID]abc123def[ARGS]{}', [{"a": 1}, {}]),
    ("llama3_json", ' {"type": "function", "name": "now", "parameters": {}} ; {"name": "now", "parameters": {}}',
     [{}, {}]),
    ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}', [{}]),
    ("pythonic", "<|python_start|>[now(), get_weather(days=0x1F, ratio=.5, where=(1, 'a',),)]<|python_end|>",
     [{}, {"days": 31, "ratio": 0.5, "where": [1, "a"]}]),
    ("pythonic", "[get_weather(city='\\x41\\u00e9\\U0001F600\\'\\q', exact=None)]",
     [{"city": "Aé😀'\\q", "exact": None}]),
    ("deepseek_v3", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>', [{}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), LOOSE)
def test_loose_spelling_is_understood(name, text, expected):
    for parts in ([text], text):
        message = read(parser(SYNTAXES[name]), parts)
        assert [json.loads(call.arguments) for call in message.calls] == expected
        assert message.content.strip() == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", '{"name": "unknown", "parameters": {}}'),
        ("llama3_json", '{"name": "now" "parameters": {}}'),
        ("pythonic", "[unknown(a=1)]"),
        ("pythonic", "[now]"),
    ],
)
def test_bare_text_is_a_call_only_of_a_known_tool(name, text):
    message = read(parser(SYNTAXES[name]), [text])
    assert message.content == text if not message.calls else message.calls[0].name == "now"
    assert "unknown" not in [call.name for call in message.calls]


def test_nothing_is_evaluated(tmp_path):
    canary = tmp_path / "canary"
    evil = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    text = f"[get_weather(city={evil})]"
    read(parser(SYNTAXES["pythonic"]), [text])
    read(parser(SYNTAXES["pythonic"]), [f"[get_weather(city=[{evil}])]"])
    assert not canary.exists()


@SYNTAX
@pytest.mark.parametrize("depth", [10, 63, 64, 5000])
def test_depth_bombs_end_in_no_error(syntax, depth):
    bomb = "[" * depth + "]" * depth
    mark = syntax.spelling
    text = f"{mark.first}{mark.before}get_weather{mark.middle}"
    text += {
        "json": f'{{"parts": {bomb}}}',
        "tags": f"<parameter=parts>\n{bomb}\n</parameter>",
        "python": f"parts={bomb}",
    }[mark.arguments]
    text += mark.after + mark.last
    for parts in ([text], text):
        message = read(parser(syntax), parts)
        assert len(message.calls) == 1
    if depth == 10:
        assert message.calls[0].arguments == f'{{"parts": {bomb}}}'


THINKING = [
    ("qwen3", False, "<think>\nhm\n</think>\n\nhi", ("hi", "hm")),
    ("qwen3", False, "\n<think>hm</think>hi", ("hi", "hm")),
    ("qwen3", False, "<think></think>hi", ("hi", "")),
    ("qwen3", False, "hi <think>hm</think>", ("hi <think>hm</think>", "")),
    ("qwen3", False, "hi", ("hi", "")),
    ("qwen3", False, "<thi", ("<thi", "")),
    ("qwen3", True, "hm\n</think>\n\nhi\n", ("hi\n", "hm")),
    ("qwen3", True, "<think>hm</think>hi", ("hi", "hm")),
    ("qwen3", True, "hm, still", ("", "hm, still")),
    ("qwen3", True, "a < b </thin </think>c", ("c", "a < b </thin")),
    ("deepseek_r1", False, "hm</think>hi", ("hi", "hm")),
    ("magistral", False, "[THINK]hm[/THINK]hi", ("hi", "hm")),
    ("seed_oss", False, "<seed:think>hm</seed:think>hi", ("hi", "hm")),
]


@pytest.mark.parametrize(("tags", "opened", "text", "expected"), THINKING)
@pytest.mark.parametrize("syntax", [None, SYNTAXES["hermes"]], ids=["plain", "tools"])
def test_thinking_is_told_apart(syntax, tags, opened, text, expected):
    for parts in ([text], text):
        reader = parser(syntax, tags=tags, opened=opened)
        message = read(reader, parts)
        assert (message.content, message.reasoning) == expected
        end = text.find(TAGS[tags].end)
        if message.reasoning and end >= 0:
            assert reader.reasoning_chars == end + len(TAGS[tags].end)


def test_a_call_inside_the_thinking_is_none():
    text = "<think>maybe " + spell(SYNTAXES["hermes"], [PARIS]) + "</think>no"
    assert said(read(parser(SYNTAXES["hermes"], tags="qwen3"), [text]))[2] == []


def _work(reader, parts) -> int:
    """Lines of Python that a reading takes: a measure that no busy machine changes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        pieces(reader, parts)
    finally:
        sys.settrace(None)
    return count


REPEATS = [
    "<tool_call>", "<tool_cal", "<", "[TOOL_CALLS]", "{", "[", '{"name": "now", "arguments": {"a": [', '"', "\\", '\\"',
    " ", "\n", "<think>", "</think", "now(", "[now(a=", "<function=now><parameter=city>", "</parameter",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "```", '{"name": "now", "parameters": {}};', "a", "{},", "[[", "{[",
    "a\n", "\\n", "\\x41",
]  # fmt: skip


@pytest.mark.parametrize("repeat", REPEATS)
@SYNTAX
def test_adversarial_repeats_take_work_in_proportion(syntax, repeat):
    """Behind each beginning of a call, byte by byte: twice the text is at most about twice the work."""
    begun = f"{syntax.spelling.first}{syntax.spelling.before}now{syntax.spelling.middle}"
    inside = {"json": '{"a": "', "tags": "<parameter=days>", "python": "a='"}[syntax.spelling.arguments]
    for opening in ("", begun, begun + inside):
        costs = [_work(parser(syntax, tags="qwen3"), opening + repeat * (size // len(repeat))) for size in (520, 1040)]
        assert costs[1] < 2.3 * costs[0] + 500
        assert costs[1] < 120 * 1040


@pytest.mark.parametrize("repeat", REPEATS)
@SYNTAX
def test_a_text_that_is_there_as_a_whole_is_read_in_runs(syntax, repeat):
    """Inside a string, a list, or nothing yet: a few lines of Python for each character, and none for most."""
    begun = f"{syntax.spelling.first}{syntax.spelling.before}now{syntax.spelling.middle}"
    inside = {"json": ('{"a": "', '{"a": ['), "tags": ("<parameter=days>",), "python": ("a='", "a=[")}
    for opening in ("", begun, *(begun + more for more in inside[syntax.spelling.arguments])):
        text = opening + repeat * (2000 // len(repeat))
        assert _work(parser(syntax, tags="qwen3"), [text]) < (40 if syntax.name == "pythonic" else 15) * len(text)
