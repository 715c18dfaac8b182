"""Calls that must be made: a grammar lets through what the model's syntax spells, and its parser reads all of it."""

from __future__ import annotations

import json
import random

import pytest
from jsonschema_rs import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer
from unit.server.parsing.spelled import ALL, parser, read, spell

from quire.server.parsing.syntaxes import SYNTAXES, Syntax
from quire.server.parsing.tool_grammar import MAX_CALLS, tool_grammar

BYTES = LLTokenizer("byte")
SYNTAX = pytest.mark.parametrize("syntax", ALL, ids=lambda syntax: syntax.name)
TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"$ref": "#/$defs/count"},
            "parts": {"type": "array", "items": {"enum": ["am", "pm"]}, "maxItems": 3},
            "unit": {"enum": ["C", "F"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
        "$defs": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
PARIS = ("get_weather", {"city": "Paris", "days": 3, "unit": "C"})


def matcher(syntax: Syntax, special_ids: dict[str, int] | None = None, **options) -> LLMatcher:
    grammar = tool_grammar(TOOLS, syntax, special_ids or {}, **options)
    assert grammar.kind == "lark"
    made = LLMatcher(BYTES, grammar.source, log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def follows(made: LLMatcher, text: str) -> bool:
    """Whether `text` is all that the grammar wants."""
    copy, data = made.deep_copy(), list(text.encode())
    return copy.try_consume_tokens(data) == len(data) and copy.is_accepting()


def spelled(syntax: Syntax, calls: list) -> str:
    text = spell(syntax, calls)
    return text.replace("'", '"') if syntax.spelling.arguments == "python" else text


@SYNTAX
def test_what_the_model_would_write_anyway_is_let_through(syntax):
    made = matcher(syntax)
    assert follows(made, spelled(syntax, [PARIS]))
    assert follows(made, spelled(syntax, [("now", {}), PARIS]))
    assert follows(made, spelled(syntax, [PARIS] * MAX_CALLS))
    assert not follows(made, spelled(syntax, [PARIS] * (MAX_CALLS + 1)))
    assert not follows(made, "")
    assert not follows(made, "Sure. " + spelled(syntax, [PARIS]))


@SYNTAX
def test_one_call_and_no_more(syntax):
    made = matcher(syntax, parallel=False)
    assert follows(made, spelled(syntax, [PARIS]))
    assert not follows(made, spelled(syntax, [PARIS, PARIS]))


@SYNTAX
@pytest.mark.parametrize(
    "call",
    [
        ("unheard", {}),
        ("now", {"city": "Paris"}),
        ("get_weather", {"city": "Paris"}),
        ("get_weather", {"city": "Paris", "unit": "K"}),
        ("get_weather", {"city": "Paris", "days": 100, "unit": "C"}),
        ("get_weather", {"city": "Paris", "parts": ["noon"], "unit": "C"}),
    ],
    ids=["name", "argument", "missing", "enum", "range", "items"],
)
def test_what_the_schemas_forbid_is_not(syntax, call):
    assert not follows(matcher(syntax), spelled(syntax, [call]))


@pytest.mark.parametrize("syntax", [one for one in ALL if one.bare is None], ids=lambda syntax: syntax.name)
def test_json_instead_of_calls(syntax):
    made = matcher(syntax, otherwise={"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]})
    assert follows(made, '{"x": 1}')
    assert follows(made, spelled(syntax, [PARIS]))
    assert not follows(made, '{"x": "a"}')


def test_markup_that_is_a_special_token_is_that_token():
    syntax = SYNTAXES["mistral"]
    made = matcher(syntax, {"[TOOL_CALLS]": 256})
    rest = list(spell(syntax, [PARIS]).removeprefix("[TOOL_CALLS]").encode())
    assert made.deep_copy().try_consume_tokens([256, *rest]) == 1 + len(rest)
    assert made.deep_copy().try_consume_tokens(list(b"[TOOL_CALLS]")) == 0


def walk(made: LLMatcher, chance: random.Random) -> str | None:
    """Any text of the grammar, byte by byte; None if it became too long. Endings are tried more often than others."""
    text = bytearray()
    endings = [b"</parameter>\n", b'"', b"}", b"]", b")"]
    while len(text) < 1500:
        if made.is_accepting() and chance.random() < 0.5:
            return text.decode()
        ending = chance.choice(endings)
        if chance.random() < 0.4:
            taken = made.try_consume_tokens(list(ending))
            if taken == len(ending):
                text += ending
                continue
            made.rollback(taken)
        bias = made.compute_logit_bias()
        printable = [byte for byte in range(128) if bias[byte] and (byte >= 32 or byte == 10)]
        possible = printable or [byte for byte in range(256) if bias[byte]]
        if not possible:
            return text.decode() if made.is_accepting() else None
        byte = chance.choice(possible)
        assert made.consume_token(byte)
        text.append(byte)
    return None


@SYNTAX
def test_whatever_is_let_through_is_read_as_calls_that_fit(syntax):
    made, chance = matcher(syntax), random.Random(7)
    complete = 0
    for _ in range(60):
        text = walk(made.deep_copy(), chance)
        if text is None:
            continue
        message = read(parser(syntax, tools=TOOLS), [text])
        assert message.calls, text
        assert message.content == ""
        for call in message.calls:
            Draft202012Validator(TOOLS[call.name]).validate(json.loads(call.arguments))
        complete += 1
    assert complete > 20
