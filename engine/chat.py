"""A conversation to the one text the model was trained on.

    messages ──plain, checked──▶ template ──▶ prompt text, in which special tokens are written out

Encode it with `add_special_tokens=False`: the template has put them already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from .config_fields import ConfigFields, read_json
from .errors import EngineStartError, RequestError
from .template import MAX_SOURCE_CHARS, Complaint, Template
from .tokenizer import Tokenizer, check_encodable
from .tool_prompt import with_tools

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 10_000  # a day of an agent's turns; each costs the template some microseconds
MAX_REASON_CHARS = 500  # of a complaint that the template wrote, which goes back to the caller
MAX_DEPTH = 32  # nesting inside tools, tool calls and template variables: deeper than any JSON schema in use
# What `render` itself sets, and what the well-known function of this name takes beside template variables.
RESERVED_VARIABLES = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "conversation", "chat_template"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens"),
        *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    }
)
# Marks where the last message ends. The space tells whether the template strips what it is given.
CONTINUE_MARK = "\ue000continue here\ue000"
# A call whose arguments tell, in what a template makes of them, whether it wants them as an object or as JSON text.
PROBE = '{"probe": 1}'


# What every chat template has to be able to write, or to refuse in its own words.
GREETING = [{"role": "user", "content": "Hello"}]
GREETING_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


class Renderer(Protocol):
    """A compiled template, here or in a worker (`rendering.py`): as `template.Template`."""

    source: str
    variables: frozenset[str]

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises TemplateError."""
        ...


class ChatTemplate:
    """A model's way of writing conversations.

    Some folders name a second template for requests with tools; it is used for those. One that reads no tools at all is
    told of them in the system message (tool_prompt.py).

    tool_source  the text of the template that writes tools
    reads_tools  whether it does
    """

    def __init__(
        self,
        source: str,
        named_tokens: Mapping[str, str],
        tool_source: str | None = None,
        compile: Callable[[str], Renderer] = Template,
    ) -> None:
        """Raises TemplateError.

        named_tokens  what bos_token and its like stand for
        compile       where the template runs: in this process, or in a worker
        """
        self._plain = compile(source)
        self._with_tools = compile(tool_source) if tool_source is not None else self._plain
        self._named_tokens = dict(named_tokens)
        self.tool_source = self._with_tools.source
        self.reads_tools = "tools" in self._with_tools.variables
        self._arguments_as_text = self.reads_tools and self._wants_text()

    @property
    def variables(self) -> frozenset[str]:
        """What `chat_template_kwargs` may set, and what a caller sets for it."""
        return self._plain.variables

    @property
    def source(self) -> str:
        return self._plain.source

    def try_out(self) -> None:
        """Write a greeting with each template. Raises TemplateError unless it can, or refuses it in its own words."""
        for template in dict.fromkeys((self._plain, self._with_tools)):
            tools = None if template is self._plain else [GREETING_TOOL]
            greeting = {"messages": GREETING, "tools": tools, "add_generation_prompt": True}
            try:
                template.render({**self._named_tokens, **greeting})
            except Complaint:
                continue

    def render(
        self,
        messages: object,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text.

        messages                a list of {"role", "content", ...}; content is text, or a list of text parts, which are
                                joined by line breaks. An assistant's may have `tool_calls`, and its thinking as
                                `reasoning` or `reasoning_content`; role "tool" is a call's result
        tools                   the functions that may be called, in the form of OpenAI's API
        add_generation_prompt   end where the assistant's answer begins
        continue_final_message  end inside the last message, which the model goes on writing
        variables               `chat_template_kwargs`: only names that this template reads

        Raises RequestError; its `param` is "messages", "tools", "chat_template_kwargs" or "continue_final_message".
        """
        template = self._with_tools if tools else self._plain
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be set; unset one",
                "continue_final_message",
            )
        conversation = _conversation(messages, keep_developer="developer" in template.source)
        if continue_final_message:
            final = conversation[-1].get("content")
            if not final:
                raise RequestError(
                    "continue_final_message: the last message has no text to continue", "continue_final_message"
                )
            conversation[-1]["content"] = final + CONTINUE_MARK + " "
        functions = _tools(tools) if tools else None
        if not self.reads_tools:
            conversation, functions = with_tools(conversation, functions or ()), None
        elif self._arguments_as_text:
            _write_arguments(conversation)
        try:
            text = template.render(
                {
                    **self._named_tokens,
                    **_variables(variables or {}, template.variables),
                    "messages": conversation,
                    "tools": functions,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except TemplateError as error:
            raise RequestError(
                f"the model's chat template cannot write this conversation: {reason(error)}; "
                "see which roles and fields the model's card allows",
                "messages",
            ) from error
        return _cut_at_mark(text) if continue_final_message else text

    def _wants_text(self) -> bool:
        """Whether a call's arguments have to be JSON text: the template joins them to other text as they are."""
        as_object, as_text = (self._probe(arguments) for arguments in (json.loads(PROBE), PROBE))
        return as_text is not None and PROBE in as_text and (as_object is None or str(json.loads(PROBE)) in as_object)

    def _probe(self, arguments: object) -> str | None:
        """A conversation with a call, as the template writes it; None if it cannot."""
        call = {"id": "probe0000", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "probe"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "probe", "tool_call_id": "probe0000", "name": "probe"},
        ]
        try:
            return self._with_tools.render({**self._named_tokens, "messages": messages, "add_generation_prompt": True})
        except TemplateError:
            return None


def load_chat_template(tokenizer: Tokenizer, compile: Callable[[str], Renderer] = Template) -> ChatTemplate | None:
    """The template of the tokenizer's folder: chat_template.jinja, else tokenizer_config.json; None if it has neither.

    Raises EngineStartError for one that cannot be read, compiled or rendered. `compile` as in `ChatTemplate`.
    """
    path, sources = _read_sources(tokenizer.folder)
    if "default" not in sources:
        return None
    try:
        template = ChatTemplate(sources["default"], tokenizer.named_tokens, sources.get("tool_use"), compile)
        template.try_out()
    except TemplateError as error:
        raise EngineStartError(f"{path}: the chat template is not usable: {reason(error)}") from error
    return template


def require_chat_template(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise RequestError(
            "this model has no chat template, so it takes no messages; send the text as a prompt instead", "messages"
        )
    return template


def _read_sources(folder: Path) -> tuple[Path, dict[str, str]]:
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > 4 * MAX_SOURCE_CHARS:
            raise EngineStartError(f"{path} has {path.stat().st_size} bytes; this is not a chat template")
        try:
            return path, {"default": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError:
            raise EngineStartError(f"{path} is not UTF-8 text") from None
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return path, {}
    settings = ConfigFields(path, read_json(path))
    found = settings.values.get("chat_template")
    if found is None:
        return path, {}
    if isinstance(found, str):
        return path, {"default": found}
    try:
        return path, {str(entry["name"]): str(entry["template"]) for entry in found}  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        settings.refuse("chat_template", 'must be text, or a list of {"name", "template"}')


def _conversation(messages: object, keep_developer: bool) -> list[dict[str, Any]]:
    """Messages as templates expect them. A developer speaks as system to templates that know no developer."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("messages must be a non-empty list", "messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages has {len(messages)} entries; at most {MAX_MESSAGES} are taken", "messages")
    conversation = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    for message in conversation:
        if message["role"] == "developer" and not keep_developer:
            message["role"] = "system"
    return conversation


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f'{where} must be an object with "role" and "content"', "messages")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, not {_shown(role)}", "messages")
    plain = {key: value for key, value in _plain(message, where, "messages").items() if value is not None}
    if "content" in plain:
        plain["content"] = _text(plain["content"], f"{where}.content")
    thoughts = plain.get("reasoning", plain.get("reasoning_content"))
    if thoughts is not None:
        plain["reasoning"] = plain["reasoning_content"] = _text(thoughts, f"{where}.reasoning")
    if plain.get("tool_calls"):
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{where}.tool_calls")
        plain.setdefault("content", "")  # templates join it to other text
    elif "content" not in plain:
        raise RequestError(f"{where}.content is missing", "messages")
    return plain


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of parts", "messages")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(f"{where}[{i}] has type {_shown(kind)}; this model reads text parts only", "messages")
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{i}].text must be text", "messages")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Arguments travel as JSON text, but templates write them from an object."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{where} must be a list of objects", "messages")
    for i, call in enumerate(calls):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}].function.name must be text", "messages")
        if isinstance(function.get("arguments"), str):
            try:
                parsed = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                raise RequestError(f"{where}[{i}].function.arguments is not JSON", "messages") from None
            function["arguments"] = _plain(parsed, f"{where}[{i}].function.arguments", "messages")
    return calls


def _write_arguments(conversation: Iterable[dict[str, Any]]) -> None:
    """The arguments of all calls as JSON text again."""
    for message in conversation:
        for call in message.get("tool_calls", ()):
            arguments = call["function"].get("arguments", {})
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)


def _tools(tools: object) -> list[dict[str, Any]]:
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools must be a list of objects", "tools")
    return [_plain(tool, f"tools[{i}]", "tools") for i, tool in enumerate(tools)]


def _variables(given: Mapping[str, Any], read: Iterable[str]) -> dict[str, Any]:
    """`chat_template_kwargs`, if the template reads them all: a name it ignores is a mistake worth an answer."""
    allowed = sorted(set(read) - RESERVED_VARIABLES)
    for name in given:
        if name in RESERVED_VARIABLES:
            raise RequestError(
                f"chat_template_kwargs: {name} is reserved and cannot be set this way", "chat_template_kwargs"
            )
        if name not in allowed:
            raise RequestError(
                f"chat_template_kwargs: this model's template does not read {_shown(name)}; "
                f"it reads {', '.join(allowed) or 'no variables'}",
                "chat_template_kwargs",
            )
    plain: dict[str, Any] = _plain(given, "chat_template_kwargs", "chat_template_kwargs")
    return plain


def _plain(value: Any, where: str, param: str, depth: int = 0) -> Any:
    """A copy made of JSON types alone, so that the sandbox meets no object with methods of its own."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {MAX_DEPTH} deep", param)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        check_encodable(value, param)
        return str(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RequestError(f"{where}: the keys of an object must be text", param)
        return {str(key): _plain(item, f"{where}.{_shown(key)}", param, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", param, depth + 1) for i, item in enumerate(value)]
    raise RequestError(f"{where} is a {type(value).__name__}, not a JSON value", param)


def _cut_at_mark(text: str) -> str:
    cut = text.rfind(CONTINUE_MARK)
    if cut < 0:
        raise RequestError(
            "continue_final_message: this model's template does not write the last message's text",
            "continue_final_message",
        )
    strips = not text.startswith(CONTINUE_MARK + " ", cut)
    return text[:cut].rstrip() if strips else text[:cut]


def reason(error: TemplateError) -> str:
    """The template's complaint, short and without the addresses of objects that it may quote."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", error.message or type(error).__name__)[:MAX_REASON_CHARS]


def _shown(value: object) -> str:
    shown = repr(value) if isinstance(value, str) else type(value).__name__
    return shown if len(shown) <= 40 else shown[:37] + "..."
