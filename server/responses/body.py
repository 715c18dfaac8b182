"""What callers of /v1/responses send, and the chat request that it means.

This server keeps no responses: a request holds its whole conversation, and what refers to another one is refused.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .. import errors
from ..as_chat import chat_body, extras_of, object_at, text_at
from ..protocol import ChatBody, Integer
from .items import messages_of

ROUTE = "/v1/responses"

# Of a chat request -> of this one: how `respelled` tells what is wrong.
NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    ".function": "",
}

# field -> the values, beside null, that ask for nothing; and what to do instead
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), "leave it out and wait for the answer, or stream it"),
    "conversation": ((), "it keeps none, so send all of it as `input`"),
    "previous_response_id": ((), "it keeps no responses, so send the whole conversation as `input`"),
    "prompt": ((), "send its text as `instructions` or `input`"),
    "top_logprobs": ((0,), "log-probabilities are to be had from /v1/chat/completions"),
}
# Of `include`; the others belong to tools that are refused, or to thinking, which is shown as it is.
LOGPROBS = "message.output_text.logprobs"


class TextBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    format: dict[str, Any] | None = None
    verbosity: str | None = None  # without effect


class ReasoningBody(BaseModel):
    """summary and the like: without effect, thinking is shown as it is."""

    model_config = ConfigDict(strict=True, extra="allow")

    effort: str | None = None


class ResponsesBody(BaseModel):
    """Beside these fields all of a chat request that have no other name here, and the same ones without effect."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str | None = None
    input: str | list[Any] | None = None
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
    tool_choice: str | dict[str, Any] | None = None
    tools: list[Any] | None = None
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] | None = None

    def chat(self, reads: Set[str]) -> ChatBody:
        """`reads`: variables of the model's template. Raises 400 for whatever cannot be said in a chat request."""
        extras = extras_of(self, ROUTE, REFUSED)
        if LOGPROBS in (self.include or ()):
            raise errors.unsupported("include", f"`include`: `{LOGPROBS}` is not supported; leave it out.")
        fields = {
            "model": self.model,
            "messages": messages_of(self.input, self.instructions),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools or ())] or None,
            "tool_choice": _tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self._effort(reads),
            "response_format": _format(self.text.format) if self.text and self.text.format else None,
        }
        return chat_body(extras | fields)

    def _effort(self, reads: Set[str]) -> str | None:
        effort = self.reasoning.effort if self.reasoning else None
        if effort not in (None, "none") and not reads & {"reasoning_effort", "enable_thinking"}:
            message = "`reasoning.effort`: this model's chat template reads none; leave it out."
            raise errors.unsupported("reasoning.effort", message)
        return effort


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
    if choice.get("type") != "function":
        raise errors.unsupported(
            "tool_choice",
            '`tool_choice` must be "none", "auto", "required" or {"type": "function", "name": …}; '
            f"got {errors.shown(choice)}.",
        )
    return {"type": "function", "function": {"name": text_at(choice.get("name"), "tool_choice.name")}}


def _format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {key: given[key] for key in given if key != "type"}}
