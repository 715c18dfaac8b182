"""What fields look like that are checked by hand, for the description at /openapi.json; types alone would say "any".

A shape describes and checks nothing but a length: what is wrong with a field is found where it is read, and told with
its place.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

Shape = dict[str, Any]

MAX_TOOLS = 128  # as OpenAI's

TEXT: Shape = {"type": "string"}
ANY_OBJECT: Shape = {"type": "object"}
IDS: Shape = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _object(required: tuple[str, ...], **properties: Shape) -> Shape:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Shape, **bounds: int) -> Shape:
    return {"type": "array", "items": items, **bounds}


def _any(*shapes: Shape) -> Shape:
    return {"anyOf": list(shapes)}


def _part(*kinds: str) -> Shape:
    return _object(("type", "text"), type={"enum": list(kinds)}, text=TEXT)


def _text_or(*kinds: str) -> Shape:
    return _any(TEXT, _list(_part(*kinds)))


_CALL = _object(("name", "arguments"), name=TEXT, arguments=TEXT)
_FUNCTION = _object(("name",), name=TEXT, description=TEXT, parameters=ANY_OBJECT, strict={"type": "boolean"})
_NAMED = _object(("type", "function"), type={"const": "function"}, function=_object(("name",), name=TEXT))
_MESSAGE = _object(
    ("role",),
    role={"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
    content=_any(_text_or("text"), {"type": "null"}),
    reasoning=TEXT,
    tool_calls=_list(_object(("function",), id=TEXT, type={"const": "function"}, function=_CALL)),
    tool_call_id=TEXT,
    name=TEXT,
)
_ALLOWED = _object(("mode", "tools"), mode={"enum": ["auto", "required"]}, tools=_list(_NAMED, minItems=1))
_STRUCTURE = _object(("begin", "schema", "end"), begin=TEXT, schema=ANY_OBJECT, end=TEXT)
_TAGS = _object(("structures", "triggers"), structures=_list(_STRUCTURE), triggers=_list(TEXT))
_SCHEMA = _any(ANY_OBJECT, TEXT)  # a JSON Schema, or the text of one
_NAMED_SCHEMA = _object(("schema",), name=TEXT, schema=ANY_OBJECT, strict={"type": "boolean"})

Messages = Annotated[list[dict[str, Any]], WithJsonSchema(_list(_MESSAGE, minItems=1))]
Tools = Annotated[
    list[dict[str, Any]],
    Field(max_length=MAX_TOOLS),
    WithJsonSchema(
        _list(
            _object(("type", "function"), type={"const": "function"}, function=_FUNCTION),
            minItems=1,
            maxItems=MAX_TOOLS,
        )
    ),
]
Functions = Annotated[
    list[dict[str, Any]], Field(max_length=MAX_TOOLS), WithJsonSchema(_list(_FUNCTION, minItems=1, maxItems=MAX_TOOLS))
]
ToolChoice = Annotated[
    str | dict[str, Any],
    WithJsonSchema(
        _any(
            {"enum": ["none", "auto", "required"]},
            _NAMED,
            _object(("type", "allowed_tools"), type={"const": "allowed_tools"}, allowed_tools=_ALLOWED),
        )
    ),
]
FunctionChoice = Annotated[
    str | dict[str, Any], WithJsonSchema(_any({"enum": ["none", "auto"]}, _object(("name",), name=TEXT)))
]
Prompt = Annotated[Any, WithJsonSchema(_any(TEXT, _list(TEXT, minItems=1), IDS, _list(IDS, minItems=1)))]
ResponseFormat = Annotated[
    dict[str, Any],
    WithJsonSchema(
        _any(
            _object(("type",), type={"enum": ["text", "json_object"]}),
            _object(("type", "json_schema"), type={"const": "json_schema"}, json_schema=_NAMED_SCHEMA),
            _object(("type", *_TAGS["required"]), type={"const": "structural_tag"}, **_TAGS["properties"]),
        )
    ),
]
StructuredOutputs = Annotated[
    dict[str, Any],
    WithJsonSchema(
        _object(
            (),
            json=_SCHEMA,
            json_object={"type": "boolean"},
            regex=TEXT,
            choice=_list(TEXT, minItems=1),
            grammar=TEXT,
            structural_tag=_any(_TAGS, TEXT),
            whitespace_pattern=TEXT,
            disable_any_whitespace={"type": "boolean"},
        )
    ),
]
Schema = Annotated[Any, WithJsonSchema(_SCHEMA)]

# Of /v1/responses.
_ITEM = _any(
    _object(
        ("role", "content"),
        type={"const": "message"},
        role={"enum": ["system", "developer", "user", "assistant"]},
        content=_text_or("input_text", "output_text", "text"),
    ),
    _object(
        ("type", "call_id", "name", "arguments"),
        type={"const": "function_call"},
        call_id=TEXT,
        name=TEXT,
        arguments=TEXT,
    ),
    _object(
        ("type", "call_id", "output"),
        type={"const": "function_call_output"},
        call_id=TEXT,
        output=_text_or("input_text", "output_text", "text"),
    ),
    _object(("type",), type={"const": "reasoning"}, content=_list(_object(("text",), text=TEXT))),
)
_NAME = _object(("type", "name"), type={"const": "function"}, name=TEXT)
Items = Annotated[str | list[Any], WithJsonSchema(_any(TEXT, _list(_ITEM, minItems=1)))]
FlatTools = Annotated[
    list[Any],
    Field(max_length=MAX_TOOLS),
    WithJsonSchema(
        _list(_object(("type", "name"), type={"const": "function"}, **_FUNCTION["properties"]), maxItems=MAX_TOOLS)
    ),
]
FlatChoice = Annotated[
    str | dict[str, Any],
    WithJsonSchema(
        _any(
            {"enum": ["none", "auto", "required"]},
            _NAME,
            _object(
                ("type", "mode", "tools"),
                type={"const": "allowed_tools"},
                mode={"enum": ["auto", "required"]},
                tools=_list(_NAME, minItems=1),
            ),
        )
    ),
]
TextFormat = Annotated[
    dict[str, Any],
    WithJsonSchema(
        _any(
            _object(("type",), type={"enum": ["text", "json_object"]}),
            _object(("type", "schema"), type={"const": "json_schema"}, name=TEXT, schema=ANY_OBJECT),
        )
    ),
]

# Of /v1/messages.
_BLOCK = _any(
    _part("text"),
    _object(("type", "thinking"), type={"const": "thinking"}, thinking=TEXT),
    _object(("type", "id", "name", "input"), type={"const": "tool_use"}, id=TEXT, name=TEXT, input=ANY_OBJECT),
    _object(("type", "tool_use_id"), type={"const": "tool_result"}, tool_use_id=TEXT, content=_text_or("text")),
)
_TURN = _object(("role", "content"), role={"enum": ["user", "assistant"]}, content=_any(TEXT, _list(_BLOCK)))
_RULES = _object(("role", "content"), role={"const": "system"}, content=_text_or("text"))
Turns = Annotated[list[Any], WithJsonSchema(_list(_any(_TURN, _RULES), minItems=1))]
System = Annotated[str | list[Any], WithJsonSchema(_text_or("text"))]
InputTools = Annotated[
    list[Any],
    Field(max_length=MAX_TOOLS),
    WithJsonSchema(
        _list(
            _object(("name", "input_schema"), name=TEXT, description=TEXT, input_schema=ANY_OBJECT), maxItems=MAX_TOOLS
        )
    ),
]
OutputFormat = Annotated[
    dict[str, Any], WithJsonSchema(_object(("type", "schema"), type={"const": "json_schema"}, schema=ANY_OBJECT))
]

# Of /v1/decisions.
DecisionInput = Annotated[Any, WithJsonSchema(_any(TEXT, _list(_ITEM, minItems=1)))]
Instructions = Annotated[Any, WithJsonSchema(_text_or("input_text", "text"))]
# The descriptions are for the model alone.
Choices = Annotated[
    list[dict[str, Any]],
    WithJsonSchema(_list(_object(("value",), value=_any(TEXT, {"type": "boolean"}), description=TEXT), minItems=2)),
]
Levels = Annotated[
    list[dict[str, Any]], WithJsonSchema(_list(_object(("label",), label=TEXT, description=TEXT), minItems=2))
]
