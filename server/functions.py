"""OpenAI's `functions`, as tools were called before: taken as tools, and their calls answered under the old names.

An old conversation has no ids: a call is answered by the next message of the role "function".
"""

from __future__ import annotations

from typing import Any

from . import errors
from .protocol import ChatBody

# Of a chat request with tools -> of one with functions: how `respelled` tells what is wrong.
NAMES = {"tools": "functions", "tool_choice": "function_call", ".function": ""}


def asks_for_functions(body: ChatBody) -> bool:
    return body.functions is not None or body.function_call is not None


def as_tools(body: ChatBody) -> ChatBody:
    """The same request in today's names; `body` itself where it has no old ones. Raises 400 for both at once."""
    messages = [message for message in body.messages if "function_call" in message or message.get("role") == "function"]
    if not messages and not asks_for_functions(body):
        return body
    changes: dict[str, Any] = {"messages": _messages(body.messages)}
    if asks_for_functions(body):
        for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
            if getattr(body, new) is not None:
                raise errors.invalid(f"`{new}` cannot stand beside `{old}`, its older name; use one of the two.", new)
        if body.functions is None and isinstance(body.function_call, dict):
            raise errors.invalid("`function_call` asks for a call, so `functions` must be set.", "function_call")
        if body.functions is not None:
            changes["tools"] = [{"type": "function", "function": function} for function in body.functions]
        changes["tool_choice"] = _choice(body.function_call)
        changes["parallel_tool_calls"] = False  # an old answer has room for one call
    return body.model_copy(update=changes)


def _choice(given: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(given, dict):
        return {"type": "function", "function": given}
    if given not in (None, "none", "auto"):
        raise errors.invalid(
            f'`function_call` must be "none", "auto" or {{"name": …}}; got {errors.shown(given)}.', "function_call"
        )
    return given


def _messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls with ids; what they are worth is told where the template reads them."""
    messages = []
    call_id = ""
    for i, message in enumerate(given):
        call = message.get("function_call")
        if call is not None and message.get("role") == "assistant":
            call_id = f"call{i:05d}"  # as short as Mistral's templates want ids
            calls = [{"id": call_id, "type": "function", "function": call}]
            message = {key: value for key, value in message.items() if key != "function_call"} | {"tool_calls": calls}
        elif message.get("role") == "function":
            message = message | {"role": "tool", "tool_call_id": call_id}
        messages.append(message)
    return messages


def old_delta(delta: dict[str, Any]) -> dict[str, Any]:
    """Of an event, or a whole message, with a call in it: the same under the old names."""
    if "tool_calls" not in delta:
        return delta
    (call,) = delta["tool_calls"]
    return {key: value for key, value in delta.items() if key != "tool_calls"} | {"function_call": call["function"]}


def old_finish(reason: str | None) -> str | None:
    return "function_call" if reason == "tool_calls" else reason
