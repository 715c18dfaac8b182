"""The input of /v1/decisions as messages of a chat: text as it is, JSON as text, calls of tools and their results."""

from __future__ import annotations

from typing import Any

import msgspec

from . import errors

ROLES = ("user", "developer", "system", "assistant")


def messages_of(given: Any) -> list[dict[str, Any]]:
    """Raises 400, naming the item, for what is no message and for what is no text."""
    if isinstance(given, str):
        if not given:
            raise errors.invalid("`input` must not be empty.", "input")
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise errors.invalid("`input` must be text or a list of messages, and not empty.", "input")
    return [_message(item, f"input[{i}]") for i, item in enumerate(given)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise errors.invalid(f"`{where}` must be an object; got {errors.shown(item)}.", where)
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ROLES:
            where = f"{where}.role"
            raise errors.invalid(f"`{where}` must be one of {', '.join(ROLES)}; got {errors.shown(role)}.", where)
        return {"role": role, "content": text_of(item.get("content"), f"{where}.content")}
    if kind in ("function_call", "custom_tool_call"):
        said = _word(item, "arguments", where) if kind == "function_call" else _custom(_word(item, "input", where))
        function = {"name": _word(item, "name", where), "arguments": said}
        call = {"id": _word(item, "call_id", where), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind in ("function_call_output", "custom_tool_call_output"):
        content = text_of(item.get("output"), f"{where}.output")
        return {"role": "tool", "tool_call_id": _word(item, "call_id", where), "content": content}
    raise errors.invalid(f"`{where}.type` is {errors.shown(kind)}, which is not taken here.", f"{where}.type")


def text_of(content: Any, where: str) -> str:
    """Text, or parts of text, refusals and JSON, which are joined by line breaks. Raises 400 for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise errors.invalid(f"`{where}` must be text or a list of parts; got {errors.shown(content)}.", where)
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text"):
        return _word(part, "text", where)
    if kind == "refusal":
        return _word(part, "refusal", where)
    if kind == "input_json":
        return msgspec.json.encode(part.get("data")).decode()
    if kind == "input_image":
        raise errors.unsupported(where, f"`{where}` is an image; this model reads text only.")
    raise errors.invalid(f"`{where}.type` must be input_text or input_json; got {errors.shown(kind)}.", where)


def _custom(said: str) -> str:
    """What a tool without parameters was told, as the one argument of a function."""
    return msgspec.json.encode({"input": said}).decode()


def _word(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise errors.invalid(f"`{where}.{name}` must be text; got {errors.shown(value)}.", f"{where}.{name}")
    return value
