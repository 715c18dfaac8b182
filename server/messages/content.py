"""The messages of /v1/messages, which are blocks of content, as the messages of a chat.

A user's message may hold the results of tools, which are messages of their own in a chat; an assistant's holds its
thinking, text and calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...engine.chat import MAX_MESSAGES
from .. import errors
from ..as_chat import object_at, text_at, text_part


def messages_of(given: Sequence[Any], system: str | Sequence[Any] | None) -> list[dict[str, Any]]:
    """Raises 400 for a block that is none, or holds what is not text."""
    if not given:
        raise errors.invalid("`messages` must not be empty.", "messages")
    if len(given) > MAX_MESSAGES:
        raise errors.invalid(f"`messages` has {len(given)} entries; at most {MAX_MESSAGES} are taken.", "messages")
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": _texts(system, "system")})
    for i, item in enumerate(given):
        where = f"messages[{i}]"
        message = object_at(item, where)
        blocks = _blocks(message.get("content"), f"{where}.content")
        role = message.get("role")
        if role == "user":
            messages += _of_user(blocks, f"{where}.content")
        elif role == "assistant":
            messages.append(_of_assistant(blocks, f"{where}.content"))
        else:
            raise errors.invalid(
                f"`{where}.role` must be user or assistant, got {errors.shown(role)}; what a system message would say "
                "goes into `system`.",
                f"{where}.role",
            )
    if messages[-1].get("tool_calls"):
        raise errors.invalid("`messages` ends with a tool_use; send its tool_result after it.", "messages")
    return messages


def _of_user(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        place = f"{where}[{i}]"
        if block.get("type") == "tool_result":
            call_id = text_at(block.get("tool_use_id"), f"{place}.tool_use_id")
            result = block.get("content")
            content = [] if result is None else _texts(result, f"{place}.content")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
            continue
        if not messages or messages[-1]["role"] != "user":
            messages.append({"role": "user", "content": []})
        messages[-1]["content"].append(_text(block, place))
    return messages or [{"role": "user", "content": []}]


def _of_assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": []}
    thoughts: list[str] = []
    for i, block in enumerate(blocks):
        place = f"{where}[{i}]"
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(text_at(block.get("thinking"), f"{place}.thinking"))
        elif kind == "tool_use":
            message.setdefault("tool_calls", []).append(_call(block, place))
        elif kind != "redacted_thinking":  # another server's, and nobody here can read it
            message["content"].append(_text(block, place))
    if thoughts:
        message["reasoning"] = "\n".join(thoughts)
    return message


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        arguments = json.dumps(object_at(block.get("input"), f"{where}.input"), ensure_ascii=False)
    except RecursionError:
        raise errors.invalid(f"`{where}.input` is nested too deeply.", f"{where}.input") from None
    function = {"name": text_at(block.get("name"), f"{where}.name"), "arguments": arguments}
    return {"id": text_at(block.get("id"), f"{where}.id"), "type": "function", "function": function}


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    """Text stands for one block of it."""
    if isinstance(content, str):
        return [text_part(content)]
    if not isinstance(content, list):
        raise errors.invalid(f"`{where}` must be text or a list of blocks; got {errors.shown(content)}.", where)
    return [object_at(block, f"{where}[{i}]") for i, block in enumerate(content)]


def _texts(content: Any, where: str) -> list[dict[str, str]]:
    return [_text(block, f"{where}[{i}]") for i, block in enumerate(_blocks(content, where))]


def _text(block: dict[str, Any], where: str) -> dict[str, str]:
    kind = block.get("type")
    if kind != "text":
        raise errors.unsupported(
            f"{where}.type", f"`{where}.type` is {errors.shown(kind)}, which this server does not take here; send text."
        )
    return text_part(text_at(block.get("text"), f"{where}.text"))
