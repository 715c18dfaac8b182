"""The messages of /v1/messages, which are blocks of content, as the messages of a chat.

A user's message may hold the results of tools, which are messages of their own in a chat; an assistant's holds its
thinking, text and calls. Messages of one role that follow each other are one turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...engine.chat import MAX_MESSAGES
from .. import errors
from ..as_chat import object_at, text_at, text_part, think, turn_of

ROLES = ("user", "assistant", "system")


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
        _add(messages, object_at(item, f"messages[{i}]"), f"messages[{i}]")
    final = messages[-1]
    if final.get("tool_calls"):
        raise errors.invalid("`messages` ends with a tool_use; send its tool_result after it.", "messages")
    if final["role"] == "assistant" and not has_text(final) and "reasoning" not in final:
        del messages[-1]  # the answer begins where it does
    if not messages:
        raise errors.invalid("`messages` says nothing; send a message with text.", "messages")
    return messages


def has_text(message: Mapping[str, Any]) -> bool:
    """Of a message of `messages_of`."""
    return any(part["text"] for part in message["content"])


def _add(messages: list[dict[str, Any]], message: dict[str, Any], where: str) -> None:
    blocks = _blocks(message.get("content"), f"{where}.content")
    role = message.get("role")
    if role not in ROLES:
        raise errors.invalid(
            f"`{where}.role` must be one of {', '.join(ROLES)}; got {errors.shown(role)}.", f"{where}.role"
        )
    if role == "user":
        _add_user(messages, blocks, f"{where}.content")
    elif role == "assistant":
        _add_assistant(turn_of(messages, role), blocks, f"{where}.content")
    else:
        if message.get("clear_at") not in (None, "never"):
            place = f"{where}.clear_at"
            raise errors.unsupported(place, f"`{place}` is not supported by this server; leave out what is over.")
        turn_of(messages, role)["content"] += [_text(block, f"{where}.content[{i}]") for i, block in enumerate(blocks)]


def _add_user(messages: list[dict[str, Any]], blocks: list[dict[str, Any]], where: str) -> None:
    if not blocks:
        turn_of(messages, "user")
    for i, block in enumerate(blocks):
        place = f"{where}[{i}]"
        if block.get("type") == "tool_result":
            call_id = text_at(block.get("tool_use_id"), f"{place}.tool_use_id")
            result = block.get("content")
            content = [] if result is None else _texts(result, f"{place}.content")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        else:
            turn_of(messages, "user")["content"].append(_text(block, place))


def _add_assistant(turn: dict[str, Any], blocks: list[dict[str, Any]], where: str) -> None:
    thoughts: list[str] = []
    for i, block in enumerate(blocks):
        place = f"{where}[{i}]"
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(text_at(block.get("thinking"), f"{place}.thinking"))
        elif kind == "tool_use":
            turn.setdefault("tool_calls", []).append(_call(block, place))
        elif kind != "redacted_thinking":  # another server's, and nobody here can read it
            turn["content"].append(_text(block, place))
    think(turn, thoughts)


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
