"""/openapi.json: every route, what its body holds down to the parts of a message, and what is answered."""

from __future__ import annotations

import jsonschema_rs
import pytest
from security.test_secrets import BODIES

from quire.server.auth import POLICIES

# Objects whose keys are the caller's, the template's or JSON Schema's to name.
FREE = {"chat_template_kwargs", "documents", "guided_json", "stream_options"}


@pytest.fixture
async def description(http):
    return (await http.get("/openapi.json")).json()


def schema_of(description, path):
    """Of the body, able to stand alone."""
    content = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    return {**content["schema"], "components": description["components"]}


def says_nothing(schema):
    """Whether some value would be right for it whatever it holds."""
    options = schema.get("anyOf", [schema])
    return any(
        not {"type", "$ref", "enum", "const", "anyOf"} & option.keys()
        or (option.get("type") == "array" and says_nothing(option.get("items", {})))
        or (option.get("type") == "object" and not {"properties", "additionalProperties"} & option.keys())
        or (option.get("additionalProperties") is True and "properties" not in option)
        for option in options
    )


def test_a_field_of_anything_is_found():
    assert says_nothing({"title": "x"})
    assert says_nothing({"anyOf": [{"type": "array", "items": {}}, {"type": "null"}]})
    assert says_nothing({"type": "object", "additionalProperties": True})
    assert not says_nothing({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]})


async def test_every_body_is_described(description):
    bodies = {path for path, policy in POLICIES.items() if policy.has_body}
    assert {path for path, methods in description["paths"].items() if "post" in methods} == bodies
    for path in bodies:
        name = schema_of(description, path)["$ref"].rsplit("/", 1)[-1]
        for field, schema in description["components"]["schemas"][name]["properties"].items():
            assert field in FREE or not says_nothing(schema), (path, field, schema)


async def test_what_is_taken_is_right_by_the_description(description):
    for path, body in BODIES:
        jsonschema_rs.Draft202012Validator(schema_of(description, path)).validate(body)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1.5]}),
        ("/v1/completions", {"prompt": "x", "response_format": {"type": "xml"}}),
        ("/v1/completions", {"prompt": "x", "n": "1"}),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}),
        ("/v1/responses", {"input": [{"type": "web_search_call"}]}),
        ("/v1/messages", {"messages": [{"role": "robot", "content": "x"}], "max_tokens": 1}),
        ("/abort_requests", {"request_ids": [1]}),
    ],
)
async def test_what_is_wrong_by_the_description_is_refused(http, description, path, body):
    assert not jsonschema_rs.Draft202012Validator(schema_of(description, path)).is_valid(body)
    assert (await http.post(path, json=body)).status_code == 400


async def test_answers_and_keys_are_described_as_they_are(description):
    for path, methods in description["paths"].items():
        policy = POLICIES[path.replace("{model}", "{model:path}")]
        for operation in methods.values():
            assert "422" not in operation["responses"]
            assert {"4XX", "5XX"} <= operation["responses"].keys()
            assert ("security" in operation) == (policy.scope is not None)
