"""What a chat request says of tools: checked, and made into how its answer is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import msgspec
from jsonschema_rs import Draft202012Validator, ValidationError

from ..scheduler.params import Grammar, Thinking
from . import errors
from .parsing.markup import Markup
from .parsing.reading import AnswerFormat
from .parsing.tool_grammar import tool_grammar
from .protocol import ChatBody

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32  # as of what templates are given
TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
# What a JSON Schema is, as a schema; it comes with the library. What it validates is data: nothing in it is fetched.
SCHEMAS = Draft202012Validator({"$ref": "https://json-schema.org/draft/2020-12/schema"})
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions that an answer may call.

    tools     as the caller described them, for the template: those that may be called, or where one is `named` all
    schemas   name -> JSON schema of the arguments
    required  at least one call has to be made
    named     the caller has named the only one: it is called once, and that is no reason to finish
    """

    tools: list[dict[str, Any]]
    schemas: dict[str, dict[str, Any]]
    required: bool = False
    named: bool = False


def tool_use(body: ChatBody, markup: Markup) -> ToolUse | None:
    """None if no function may be called. Raises 400 for tools that are none, or that this model cannot call."""
    choice = body.tool_choice
    if body.tools is None:
        if choice not in (None, "none", "auto"):
            raise errors.invalid("`tool_choice` asks for a call, so `tools` must be set.", "tool_choice")
        return None
    if not body.tools:
        raise errors.invalid("`tools` must not be an empty array; leave it out.", "tools")
    schemas: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(body.tools):
        name, schema = _function(tool, f"tools[{i}]")
        if name in schemas:
            raise errors.invalid(f"`tools[{i}].function.name`: `{name}` is there twice; rename one.", "tools")
        schemas[name] = schema
    required, allowed = _chosen(choice, schemas)
    if choice == "none":
        return None
    if markup.syntax is None:
        raise errors.unsupported(
            "tools",
            "How this model spells calls of `tools` is not known from its chat template; leave them out, or start the "
            "server with --tool-call-parser and the name of the syntax.",
        )
    named = isinstance(choice, dict) and choice["type"] == "function"
    return ToolUse(
        tools=[tool for tool in body.tools if named or tool["function"]["name"] in allowed],
        schemas={name: schema for name, schema in schemas.items() if name in allowed},
        required=required,
        named=named,
    )


def _function(tool: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Name and schema of one entry of `tools`."""
    if tool.get("type") != "function":
        raise errors.invalid(f'`{where}.type` must be "function", got {errors.shown(tool.get("type"))}.', "tools")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise errors.invalid(f"`{where}.function` must be an object with a `name`.", "tools")
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise errors.invalid(
            f"`{where}.function.name` must be 1 to 64 letters, digits, dots, colons, dashes or underscores; "
            f"got {errors.shown(name)}.",
            "tools",
        )
    if schema is None:
        return name, NO_ARGUMENTS
    param = f"{where}.function.parameters"
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise errors.invalid(f'`{param}` must be a JSON Schema with "type": "object".', "tools")
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise errors.invalid(f"`{param}` is nested more than {MAX_SCHEMA_DEPTH} deep.", "tools")
    written = msgspec.json.encode(schema)
    if len(written) > MAX_SCHEMA_BYTES:
        raise errors.invalid(f"`{param}` has {len(written)} bytes; at most {MAX_SCHEMA_BYTES} are taken.", "tools")
    try:
        SCHEMAS.validate(schema)
    except ValidationError as error:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
        raise errors.invalid(
            f"`{param}{errors.shown(place)}` is not JSON Schema: {errors.shown(error.message)}.", "tools"
        ) from None
    return name, schema


def _depth(value: object) -> int:
    """Of lists and objects in one another; counted no further than matters."""
    depth, level = 0, [value]
    while level and depth <= MAX_SCHEMA_DEPTH:
        nested = [item for item in level if isinstance(item, dict | list)]
        depth += bool(nested)
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _chosen(choice: object, schemas: Mapping[str, object]) -> tuple[bool, Set[str]]:
    """Whether a call has to be made, and which may be. Raises 400 for a choice that is none."""
    if not isinstance(choice, dict):
        if choice not in (None, "none", "auto", "required"):
            raise _no_choice(choice)
        return choice == "required", schemas.keys()
    if choice.get("type") == "function":
        return True, {_name_in(choice, schemas)}
    allowed = choice.get("allowed_tools") if choice.get("type") == "allowed_tools" else None
    if not isinstance(allowed, dict) or allowed.get("mode") not in ("auto", "required"):
        raise _no_choice(choice)
    tools = allowed.get("tools")
    if not isinstance(tools, list) or not tools:
        raise _no_choice(choice)
    return allowed["mode"] == "required", {_name_in(tool, schemas) for tool in tools}


def _name_in(choice: object, schemas: Mapping[str, object]) -> str:
    """The function that `choice` names. Raises 400 for none of `schemas`."""
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict):
        raise _no_choice(choice)
    name = function.get("name")
    if not isinstance(name, str) or name not in schemas:
        raise errors.invalid(
            f"The tool specified in `tool_choice` does not match any of the specified `tools`: {errors.shown(name)}.",
            "tool_choice",
        )
    return name


def _no_choice(choice: object) -> errors.ApiError:
    return errors.invalid(
        '`tool_choice` must be "none", "auto", "required", {"type": "function", "function": {"name": …}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": […]}}; '
        f"got {errors.shown(choice)}.",
        "tool_choice",
    )


def required_calls(body: ChatBody, use: ToolUse | None, markup: Markup) -> tuple[Grammar, str] | None:
    """The grammar of calls that have to be made, and the field that asks for it; None if nothing has to.

    Beside a form of the answer that is JSON, an answer is either of the two, where a mark tells them apart. Raises 400
    for another form beside tools.
    """
    asked = body.grammar
    if use is None or markup.syntax is None or (asked is None and not use.required):
        return None
    otherwise = None
    if asked is not None:
        grammar, field = asked
        if use.required or markup.syntax.bare is not None or grammar.kind not in ("json_object", "json_schema"):
            raise errors.invalid(
                f"`{field}` and the calls of `tools` both constrain the answer; leave one of them out, or set "
                '`tool_choice` to "none".',
                field,
            )
        otherwise = msgspec.json.decode(grammar.source) if grammar.source else {"type": "object"}
    grammar = tool_grammar(
        use.schemas,
        markup.syntax,
        markup.special_ids,
        parallel=not use.named and body.parallel_tool_calls is not False,
        otherwise=otherwise,
    )
    return grammar, "tools"


def thinking_of(body: ChatBody, markup: Markup, *, opened: bool, awaited: bool) -> Thinking | None:
    """Where the answer begins, if that matters: for a budget, or for a grammar that awaits it. Raises 400."""
    budget = body.thinking_token_budget
    if budget is not None and budget < 0:
        raise errors.invalid(f"`thinking_token_budget` must be at least 0, got {budget}.", "thinking_token_budget")
    if markup.tags is None:
        if budget is not None:
            raise errors.unsupported(
                "thinking_token_budget",
                "`thinking_token_budget`: this model does not mark its thinking; leave it out, or start the server "
                "with --reasoning-parser and the name of its tags.",
            )
        return None
    if budget is None and not awaited:
        return None
    return Thinking(
        start_ids=markup.start_ids, end_ids=markup.end_ids, opened=opened or markup.tags.always, budget=budget
    )


def answer_format(body: ChatBody, use: ToolUse | None, markup: Markup, rendered: str) -> AnswerFormat:
    """How the answer to the prompt `rendered` is to be read."""
    syntax = markup.syntax if use else None
    marks = (*(syntax.marks if syntax else ()), *((markup.tags.start, markup.tags.end) if markup.tags else ()))
    special = {mark: markup.special_ids[mark] for mark in marks if mark in markup.special_ids}
    return AnswerFormat(
        tags=markup.tags,
        syntax=syntax,
        opened=_is_opened(body, markup, rendered),
        tools=use.schemas if use else {},
        hidden=frozenset(special) if body.skip_special_tokens is not False else frozenset(),
        markup_ids=frozenset(special.values()),
        parallel_calls=body.parallel_tool_calls is not False,
        include_reasoning=body.include_reasoning is not False,
        named_call=use is not None and use.named,
    )


def _is_opened(body: ChatBody, markup: Markup, rendered: str) -> bool:
    """Whether the prompt ends inside the thinking: what a user wrote about tags further up says nothing of it."""
    tags = markup.tags
    if tags is None:
        return False
    if not body.continue_final_message:
        return rendered.rstrip().endswith(tags.start)
    final = body.final_text
    return final.rfind(tags.start) > final.rfind(tags.end)
