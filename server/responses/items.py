"""The items of a conversation, as /v1/responses has them, as the messages of a chat.

What an assistant did in one turn is several items (thinking, text, calls) and one message.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...engine.chat import MAX_MESSAGES
from .. import errors
from ..as_chat import list_at, object_at, text_at, text_part, think, turn_of

ROLES = ("system", "developer", "user", "assistant")
# part -> the field with its text
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def messages_of(given: str | Sequence[Any] | None, instructions: str | None) -> list[dict[str, Any]]:
    """Raises 400 for an item that is none, or holds what is not text."""
    if not given:
        raise errors.missing("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if len(items) > MAX_MESSAGES:
        raise errors.invalid(f"`input` has {len(items)} items; at most {MAX_MESSAGES} are taken.", "input")
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": [text_part(instructions)]})
    for i, item in enumerate(items):
        _add(messages, object_at(item, f"input[{i}]"), f"input[{i}]", instructed=bool(instructions))
    return messages


def _add(messages: list[dict[str, Any]], item: dict[str, Any], where: str, *, instructed: bool) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(messages, item, where, instructed=instructed)
    elif kind == "reasoning":
        think(turn_of(messages, "assistant"), _thoughts(item, where))
    elif kind == "function_call":
        turn_of(messages, "assistant").setdefault("tool_calls", []).append(_call(item, where))
    elif kind == "function_call_output":
        call_id = text_at(item.get("call_id"), f"{where}.call_id")
        result = _parts(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
    elif kind == "item_reference":
        raise errors.unsupported(where, f"`{where}`: this server keeps no items to refer to; send the item itself.")
    else:
        raise errors.unsupported(
            f"{where}.type",
            f"`{where}.type` is {errors.shown(kind)}; this server takes message, function_call, function_call_output "
            "and reasoning.",
        )


def _add_message(messages: list[dict[str, Any]], item: dict[str, Any], where: str, *, instructed: bool) -> None:
    """Templates know one system message, so those that follow the instructions at once join them."""
    role = item.get("role")
    if role not in ROLES:
        raise errors.invalid(
            f"`{where}.role` must be one of {', '.join(ROLES)}; got {errors.shown(role)}.", f"{where}.role"
        )
    parts = _parts(item.get("content"), f"{where}.content")
    if role == "assistant":
        turn_of(messages, role)["content"] += parts
    elif role in ("system", "developer") and instructed and len(messages) == 1:
        messages[0]["content"] += parts
    else:
        messages.append({"role": role, "content": parts})


def _thoughts(item: dict[str, Any], where: str) -> list[str]:
    """`encrypted_content` is another server's, and nobody here can read it."""
    return [
        text_at(object_at(part, f"{where}.{field}[{i}]").get("text"), f"{where}.{field}[{i}].text")
        for field in ("content", "summary")
        for i, part in enumerate(list_at(item.get(field), f"{where}.{field}"))
    ]


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = text_at(item.get("arguments"), f"{where}.arguments")
    try:
        json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        raise errors.invalid(f"`{where}.arguments` is not JSON.", f"{where}.arguments") from None
    function = {"name": text_at(item.get("name"), f"{where}.name"), "arguments": arguments}
    return {"id": text_at(item.get("call_id"), f"{where}.call_id"), "type": "function", "function": function}


def _parts(content: Any, where: str) -> list[dict[str, str]]:
    """Text, or a list of parts that have one."""
    if isinstance(content, str):
        return [text_part(content)]
    if not isinstance(content, list):
        raise errors.invalid(f"`{where}` must be text or a list of parts; got {errors.shown(content)}.", where)
    parts = []
    for i, part in enumerate(content):
        place = f"{where}[{i}]"
        kind = object_at(part, place).get("type")
        field = TEXTS.get(kind) if isinstance(kind, str) else None
        if field is None:
            raise errors.unsupported(
                f"{place}.type", f"`{place}.type` is {errors.shown(kind)}; this server takes text only (input_text)."
            )
        parts.append(text_part(text_at(part.get(field), f"{place}.{field}")))
    return parts
