"""The input of /v1/decisions as messages of a chat: text as it is, JSON as text, calls of tools and their results."""

from __future__ import annotations

from typing import Any

import msgspec

from . import errors
from .as_chat import text_at

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
        field = "arguments" if kind == "function_call" else "input"
        said = text_at(item.get(field), f"{where}.{field}")
        arguments = said if kind == "function_call" else _custom(said)
        function = {"name": text_at(item.get("name"), f"{where}.name"), "arguments": arguments}
        call = {"id": text_at(item.get("call_id"), f"{where}.call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind in ("function_call_output", "custom_tool_call_output"):
        content = text_of(item.get("output"), f"{where}.output")
        return {"role": "tool", "tool_call_id": text_at(item.get("call_id"), f"{where}.call_id"), "content": content}
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
        return text_at(part.get("text"), f"{where}.text")
    if kind == "refusal":
        return text_at(part.get("refusal"), f"{where}.refusal")
    if kind == "input_json":
        try:
            return msgspec.json.encode(part.get("data")).decode()
        except RecursionError:
            raise errors.invalid(f"`{where}.data` is nested too deeply.", f"{where}.data") from None
    if kind == "input_image":
        raise errors.unsupported(where, f"`{where}` is an image; this model reads text only.")
    raise errors.invalid(f"`{where}.type` must be input_text or input_json; got {errors.shown(kind)}.", where)


def _custom(said: str) -> str:
    """What a tool without parameters was told, as the one argument of a function."""
    return msgspec.json.encode({"input": said}).decode()
