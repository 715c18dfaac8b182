"""Requests of other shapes, made into the chat requests that they mean: templates, tools and thinking are the same.

fields ──chat_body──▶ ChatBody ──open_chat──▶ Generation        respelled: what is wrong, in the caller's own names
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from ..engine.errors import RequestError
from . import errors
from .generate import GenerateRequest, Generation
from .inputs import Order, TextSide, chat_size
from .protocol import ChatBody
from .state import State

# Fields of a chat request that other surfaces have names of their own for, or no place in their answers.
ONLY_CHAT = frozenset(
    {
        "add_generation_prompt", "continue_final_message", "echo", "function_call", "functions", "include_reasoning",
        "logprob_token_ids", "logprobs", "max_completion_tokens", "max_tokens", "messages", "n", "prompt_logprobs",
        "reasoning_effort", "response_format", "return_prompt_text", "return_token_ids", "return_tokens_as_token_ids",
        "stream_options", "top_logprobs",
    }
)  # fmt: skip


def extras_of(body: BaseModel, route: str, refused: Mapping[str, tuple[tuple[Any, ...], str]]) -> dict[str, Any]:
    """The fields of `body` that it does not declare, which a chat request takes as well: seed, top_k, timeout …

    refused  what asks for something that this server cannot do: the values, beside null, that do not; the remedy
    """
    extras = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    for name, value in extras.items():
        if name in ONLY_CHAT:
            raise errors.unsupported(name, f"`{name}` is not a field of {route}; leave it out.")
        harmless, remedy = refused.get(name, ((value,), ""))
        if value not in harmless:
            raise errors.unsupported(name, f"`{name}` is not supported by this server; {remedy}.")
    return {name: value for name, value in extras.items() if name not in refused}


def chat_body(fields: Mapping[str, Any]) -> ChatBody:
    """Raises 400 for an extra of the wrong type."""
    try:
        return ChatBody.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        found = [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors()]
        raise errors.from_validation(found, fields) from None


def template_variables(text: TextSide) -> Set[str]:
    """What the model's chat template reads from its caller."""
    return text.template.variables if text.template else frozenset()


async def open_chat(
    request: Request, state: State, chat: ChatBody, prepare: Callable[[ChatBody, Order], GenerateRequest]
) -> Generation:
    """As a chat request is let in; `prepare` runs on a text thread. Whoever gets the Generation must close it."""
    chat.check_together(state.text.limits)
    order = state.order_of(request, chat)
    return await state.open_generation(chat_size(chat), order, lambda: prepare(chat, order))


@contextmanager
def respelled(names: Mapping[str, str]) -> Iterator[None]:
    """What is refused inside is told in the caller's names. `names`: of a chat request -> of the caller's.

    One that is a plain English word is replaced where it is the field at fault; one that begins with a dot is part of
    a longer name.
    """
    try:
        yield
    except (errors.ApiError, RequestError) as error:
        refusal = error if isinstance(error, errors.ApiError) else errors.from_engine(error)
        param, message = refusal.param or "", refusal.message
        for theirs, ours in names.items():
            if theirs.startswith("."):
                param, message = param.replace(theirs, ours), message.replace(theirs, ours)
                continue
            word = re.compile(rf"(?<![\w.]){theirs}(?!\w)")
            at_fault = word.match(param) is not None
            if at_fault or "_" in theirs:
                message = word.sub(ours, message)
            if at_fault:
                param = ours + param[len(theirs) :]
        refusal.param, refusal.message = param or None, message
        raise refusal from None


def text_at(value: Any, where: str) -> str:
    """Raises 400, naming the field, for anything but text."""
    if not isinstance(value, str):
        raise errors.invalid(f"`{where}` must be text; got {errors.shown(value)}.", where)
    return value


def object_at(value: Any, where: str) -> dict[str, Any]:
    """Raises 400, naming the field, for anything but an object."""
    if not isinstance(value, dict):
        raise errors.invalid(f"`{where}` must be an object; got {errors.shown(value)}.", where)
    return value


def list_at(value: Any, where: str) -> list[Any]:
    """None is none. Raises 400, naming the field, for anything else but a list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise errors.invalid(f"`{where}` must be a list; got {errors.shown(value)}.", where)
    return value


def turn_of(messages: list[dict[str, Any]], role: str) -> dict[str, Any]:
    """The message of `role` that the conversation ends with, or a new one there."""
    if not messages or messages[-1]["role"] != role:
        messages.append({"role": role, "content": []})
    return messages[-1]


def think(turn: dict[str, Any], thoughts: Sequence[str]) -> None:
    """Further thinking of an assistant's turn."""
    if thoughts:
        turn["reasoning"] = "\n".join([turn["reasoning"], *thoughts] if "reasoning" in turn else thoughts)


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
