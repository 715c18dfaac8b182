"""Every spelling of a constraint means one grammar; what is none is refused by the name that the caller wrote."""

from __future__ import annotations

import json

import pytest

from quire.scheduler.params import Grammar
from quire.server.errors import ApiError
from quire.server.structured import grammar_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAGS = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}


def schema(given: dict) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(given, separators=(",", ":")))


@pytest.mark.parametrize(
    ("response_format", "structured", "guided", "grammar", "field"),
    [
        ({"type": "json_object"}, None, {}, Grammar(kind="json_object"), "response_format"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
            None,
            {},
            schema(SCHEMA),
            "response_format",
        ),
        (None, {"json": SCHEMA}, {}, schema(SCHEMA), "structured_outputs.json"),
        (None, {"json": json.dumps(SCHEMA)}, {}, schema(SCHEMA), "structured_outputs.json"),
        (None, {"json_object": True}, {}, schema({"type": "object"}), "structured_outputs.json_object"),
        (None, {"regex": "a+"}, {}, Grammar(kind="regex", source="a+"), "structured_outputs.regex"),
        (None, {"choice": ["a", "é"]}, {}, Grammar(kind="choice", source='["a","é"]'), "structured_outputs.choice"),
        (None, {"grammar": "start: /a/"}, {}, Grammar(kind="lark", source="start: /a/"), "structured_outputs.grammar"),
        (
            None,
            {"json": SCHEMA, "disable_any_whitespace": True},
            {},
            schema(SCHEMA | {"x-guidance": {"whitespace_pattern": ""}}),
            "structured_outputs.json",
        ),
        (
            None,
            None,
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?", "guided_regex": None},
            schema(SCHEMA | {"x-guidance": {"whitespace_pattern": " ?"}}),
            "guided_json",
        ),
        (None, None, {"guided_choice": ["a"]}, Grammar(kind="choice", source='["a"]'), "guided_choice"),
        (None, None, {"guided_grammar": "start: /a/"}, Grammar(kind="lark", source="start: /a/"), "guided_grammar"),
        (None, {"regex": "a", "json": None, "json_object": False}, {}, Grammar(kind="regex", source="a"), None),
        (
            None,
            None,
            {"guided_json_object": False, "guided_regex": "a"},
            Grammar(kind="regex", source="a"),
            "guided_regex",
        ),
    ],
)
def test_spellings(response_format, structured, guided, grammar, field):
    found = grammar_of(response_format, structured, guided)
    assert found is not None
    assert found[0] == grammar
    assert field is None or found[1] == field


def test_structural_tags_as_an_object_or_as_text():
    for given in ({"type": "structural_tag", **TAGS}, TAGS):
        asked = (given, None) if "type" in given else (None, {"structural_tag": json.dumps(given)})
        found = grammar_of(*asked, {})
        assert found is not None
        assert json.loads(found[0].source) == TAGS


@pytest.mark.parametrize("given", [None, {"type": "text"}])
def test_nothing_asked(given):
    assert grammar_of(given, None, {"guided_json": None, "guided_json_object": False}) is None


@pytest.mark.parametrize(
    ("response_format", "structured", "guided", "param"),
    [
        ({}, None, {}, "response_format.type"),
        ({"type": 3}, None, {}, "response_format.type"),
        ({"type": "json_schema", "json_schema": {"schema": 3}}, None, {}, "response_format.json_schema.schema"),
        ({"type": "structural_tag", "structures": [], "triggers": ["a"]}, None, {}, "response_format"),
        ({"type": "structural_tag", **TAGS, "triggers": ["<g"]}, None, {}, "response_format"),
        ({"type": "structural_tag", "structures": [{"begin": "<f>"}], "triggers": ["<f"]}, None, {}, "response_format"),
        (None, [], {}, "structured_outputs"),
        (None, {"json_object": 1}, {}, "structured_outputs.json_object"),
        (None, {"regex": ""}, {}, "structured_outputs.regex"),
        (None, {"regex": 5}, {}, "structured_outputs.regex"),
        (None, {"choice": "ab"}, {}, "structured_outputs.choice"),
        (None, {"choice": ["a", ""]}, {}, "structured_outputs.choice"),
        (None, {"json": "\ud800"}, {}, "structured_outputs.json"),
        (None, {"json": SCHEMA, "whitespace_pattern": 3}, {}, "structured_outputs.whitespace_pattern"),
        (None, {"regex": "a"}, {"guided_regex": "a"}, "guided_regex"),
        (None, None, {"guided_regex": "a", "guided_choice": ["a"]}, "structured_outputs"),
    ],
)
def test_refusals_name_what_the_caller_wrote(response_format, structured, guided, param):
    with pytest.raises(ApiError) as refusal:
        grammar_of(response_format, structured, guided)
    assert (refusal.value.status, refusal.value.param) == (400, param)
