"""What callers of /v1/responses send, and the chat request that it means.

This server keeps no responses: a request holds its whole conversation, and what refers to another one is refused.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .. import errors, shapes
from ..as_chat import chat_body, extras_of, list_at, object_at, text_at
from ..protocol import ChatBody, Effort, Integer
from .items import messages_of

ROUTE = "/v1/responses"

# Of a chat request -> of this one: how `respelled` tells what is wrong.
NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "logprobs": "top_logprobs",
    ".function": "",
}

# field -> the values, beside null, that ask for nothing; and what to do instead
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), "leave it out and wait for the answer, or stream it"),
    "conversation": ((), "it keeps none, so send all of it as `input`"),
    "previous_response_id": ((), "it keeps no responses, so send the whole conversation as `input`"),
    "prompt": ((), "send its text as `instructions` or `input`"),
}
# Of `include`, what turns log-probabilities on, as rivals that are asked for do; the others belong to tools that are
# refused, or to thinking, which is shown as it is.
LOGPROBS = "message.output_text.logprobs"


class TextBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    format: shapes.TextFormat | None = None
    verbosity: str | None = None  # without effect


class ReasoningBody(BaseModel):
    """summary and the like: without effect, thinking is shown as it is."""

    model_config = ConfigDict(strict=True, extra="allow")

    effort: Effort | None = None


class ResponsesBody(BaseModel):
    """Beside these fields all of a chat request that have no other name here, and the same ones without effect."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str | None = None
    input: shapes.Items | None = None
    instructions: str | None = None
    max_output_tokens: Integer | None = None
    max_tool_calls: Integer | None = None  # without effect: it bounds tools that a server calls
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningBody | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None  # without effect: all there is to set is padding
    temperature: float | None = None
    text: TextBody | None = None
    tool_choice: shapes.FlatChoice | None = None
    tools: shapes.FlatTools | None = None
    top_logprobs: Integer | None = None
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] | None = None

    def chat(self) -> ChatBody:
        """Raises 400 for whatever cannot be said in a chat request."""
        extras = extras_of(self, ROUTE, REFUSED)
        fields = {
            "model": self.model,
            "messages": messages_of(self.input, self.instructions),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools or ())] or None,
            "tool_choice": _tool_choice(self.tool_choice),
            "logprobs": self.shows_logprobs,
            "top_logprobs": self.top_logprobs,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": _format(self.text.format) if self.text and self.text.format else None,
        }
        return chat_body(extras | fields)

    @property
    def shows_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """A function is described one level deeper in a chat request."""
    kind = object_at(tool, where).get("type")
    if kind != "function":
        raise errors.unsupported(
            f"{where}.type", f'`{where}.type` must be "function", got {errors.shown(kind)}: this server runs no tools.'
        )
    return {"type": "function", "function": {key: tool[key] for key in tool if key != "type" and tool[key] is not None}}


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        where = "tool_choice.tools"
        tools = [
            _named(object_at(tool, f"{where}[{i}]"), f"{where}[{i}]")
            for i, tool in enumerate(list_at(choice.get("tools"), where))
        ]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return _named(choice, "tool_choice")


def _named(choice: dict[str, Any], where: str) -> dict[str, Any]:
    if choice.get("type") != "function":
        raise errors.unsupported(
            "tool_choice",
            f'`{where}` must be {{"type": "function", "name": …}}'
            + (', {"type": "allowed_tools", …}, "none", "auto" or "required"' if where == "tool_choice" else "")
            + f"; got {errors.shown(choice)}.",
        )
    return {"type": "function", "function": {"name": text_at(choice.get("name"), f"{where}.name")}}


def _format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {key: given[key] for key in given if key != "type"}}
