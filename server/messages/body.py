"""What callers of /v1/messages send, and the chat request that it means."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .. import errors, shapes
from ..as_chat import chat_body, extras_of, object_at, template_variables, text_at
from ..inputs import TextSide
from ..protocol import ChatBody, Effort, Integer
from .content import has_text, messages_of

ROUTE = errors.ANTHROPIC

# Of a chat request -> of this one: how `respelled` tells what is wrong.
NAMES = {
    "prompt": "messages",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "continue_final_message": "messages",
    "response_format": "output_config.format",
    "thinking_token_budget": "thinking.budget_tokens",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    ".json_schema": "",
    ".function.parameters": ".input_schema",
    ".function": "",
}

# field -> the values, beside null, that ask for nothing; and what to do instead
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "compaction": ((), "leave it out, and ask for a summary in a message"),
    "container": ((), "leave it out"),
    "mcp_servers": (([],), "leave it out"),
    "stop": ((), "here its name is `stop_sequences`"),
    "thread": ((), "it keeps no messages, so send all of them as `messages`"),
}
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class ThinkingBody(BaseModel):
    """Anything else, as `display`: without effect."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Integer | None = None


class OutputBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    effort: Effort | None = None  # a hint: for models whose template reads one
    format: shapes.OutputFormat | None = None


class ToolChoiceBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class PromptBody(BaseModel):
    """What makes the prompt: a body of /v1/messages/count_tokens, and with what comes of it, of /v1/messages."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    messages: shapes.Turns
    model: str | None = None
    output_config: OutputBody | None = None
    output_format: shapes.OutputFormat | None = None  # the older name of `output_config.format`
    system: shapes.System | None = None
    thinking: ThinkingBody | None = None
    tool_choice: ToolChoiceBody | None = None
    tools: shapes.InputTools | None = None

    @property
    def names(self) -> Mapping[str, str]:
        """For `respelled`."""
        return NAMES if self.output_format is None else {**NAMES, "response_format": "output_format"}

    def chat(self, text: TextSide) -> ChatBody:
        """Raises 400 for whatever cannot be said in a chat request."""
        return chat_body(self._fields(text))

    def _fields(self, text: TextSide) -> dict[str, Any]:
        extras = extras_of(self, ROUTE, REFUSED)
        messages = messages_of(self.messages, self.system)
        continues = messages[-1]["role"] == "assistant" and has_text(messages[-1])
        output, choice, reads = self.output_config or OutputBody(), self.tool_choice, template_variables(text)
        effort = output.effort if "reasoning_effort" in reads and self.thinks else None
        variables = object_at(extras.get("chat_template_kwargs", {}), "chat_template_kwargs")
        # What is not marked as thinking is none, which keeps within any budget.
        budget = self.thinking.budget_tokens if self.thinking and self.thinks and text.markup.tags else None
        return extras | {
            "model": self.model,
            "messages": messages,
            "add_generation_prompt": not continues,
            "continue_final_message": continues,
            "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools or ())] or None,
            "tool_choice": None if choice is None else _tool_choice(choice),
            "parallel_tool_calls": not choice.disable_parallel_tool_use if choice else None,
            "include_reasoning": self.thinks,
            "reasoning_effort": effort,
            "thinking_token_budget": budget,
            "chat_template_kwargs": self._thinking_switch(reads) | variables,
            "response_format": self._response_format(output),
        }

    @property
    def thinks(self) -> bool:
        """Callers that do not ask for thinking do not expect any: what they read is the first block."""
        return self.thinking is not None and self.thinking.type != "disabled"

    def _thinking_switch(self, reads: Set[str]) -> dict[str, Any]:
        return {"enable_thinking": self.thinks} if "enable_thinking" in reads else {}

    def _response_format(self, output: OutputBody) -> dict[str, Any] | None:
        """Raises 400 for both names at once, and for what is no schema."""
        if self.output_format is None:
            return None if output.format is None else _format(output.format, "output_config.format")
        if output.format is not None:
            raise errors.invalid(
                "`output_format` cannot stand beside `output_config.format`, its newer name; use one of the two.",
                "output_format",
            )
        return _format(self.output_format, "output_format")


class MessagesBody(PromptBody):
    """Beside these fields all of a chat request that have no other name here, and the same ones without effect."""

    max_tokens: Integer
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None

    def _fields(self, text: TextSide) -> dict[str, Any]:
        return super()._fields(text) | {
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


def _tool(tool: Any, where: str) -> dict[str, Any]:
    kind = object_at(tool, where).get("type")
    if kind not in (None, "custom"):
        raise errors.unsupported(
            f"{where}.type", f'`{where}.type` must be "custom", got {errors.shown(kind)}: this server runs no tools.'
        )
    schema = object_at(tool.get("input_schema"), f"{where}.input_schema")
    function = {"name": text_at(tool.get("name"), f"{where}.name"), "parameters": schema}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoiceBody) -> str | dict[str, Any]:
    if choice.type != "tool":
        return TOOL_CHOICES[choice.type]
    return {"type": "function", "function": {"name": text_at(choice.name, "tool_choice.name")}}


def _format(given: dict[str, Any], where: str) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        raise errors.invalid(
            f'`{where}.type` must be "json_schema", got {errors.shown(given.get("type"))}.', f"{where}.type"
        )
    schema = object_at(given.get("schema"), f"{where}.schema")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
