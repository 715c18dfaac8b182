"""Tools for chat templates that know of none: what the functions are, calls and results, all as plain text.

Calls are written as in the widespread form <tool_call>{"name": …, "arguments": …}</tool_call>, which is how answers are
read then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

INTRODUCTION = (
    "You can call functions. Each line below describes one, with a JSON Schema of its arguments:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call one, write a JSON object with its name and arguments between these tags:\n"
    '<tool_call>\n{{"name": "...", "arguments": {{...}}}}\n</tool_call>'
)


def with_tools(conversation: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in the roles that every template knows, results that follow one another in one message.

    tools: described in the system message, if there are any
    """
    told: list[dict[str, Any]] = []
    for message in conversation:
        if message["role"] == "tool" and told and told[-1].get("role") == "tool":
            told[-1] = {**told[-1], "content": f"{told[-1]['content']}\n{_result(message)}"}
        else:
            told.append(_told(message))
    told = [{**message, "role": "user"} if message["role"] == "tool" else message for message in told]
    if not tools:
        return told
    text = INTRODUCTION.format(tools="\n".join(_json(tool.get("function", tool)) for tool in tools))
    if told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def _told(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "tool", "content": _result(message)}
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message["content"]] if message["content"] else []
    texts += [f"<tool_call>\n{_json(_call(call['function']))}\n</tool_call>" for call in calls]
    return {"role": message["role"], "content": "\n".join(texts)}


def _result(message: Mapping[str, Any]) -> str:
    return f"<tool_response>\n{message['content']}\n</tool_response>"


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function.get("arguments", {})}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
