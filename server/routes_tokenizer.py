"""The tokenizer as a service, for clients that count tokens or send ids and have none of their own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..engine.validation import valid_token_ids
from . import errors
from .inputs import encode_chat, render_chat
from .json_answer import json_answer
from .protocol import DetokenizeBody, TokenizeBody
from .routing import GuardedRoute
from .state import state_of

router = APIRouter(route_class=GuardedRoute)


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    state = state_of(request)
    state.model_name(body.model)
    body.refuse_unbuilt()
    if (body.prompt is None) == (body.messages is None):
        raise errors.invalid("Send either `prompt` or `messages`.", "prompt")
    tokenizer = state.text.tokenizer

    def encode() -> list[int]:
        if body.prompt is None:
            return encode_chat(render_chat(body, state.text, body.tools), body, state.text)
        tokenizer.check_bytes(body.prompt, state.ready.max_model_len)
        return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)

    def answer() -> Response:
        ids = encode()
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": state.ready.max_model_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in ids]
        return json_answer(answer)

    return await state.in_pool(answer)


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    state = state_of(request)
    state.model_name(body.model)
    body.refuse_unbuilt()

    def answer() -> Response:
        valid_token_ids(body.tokens, state.ready.vocab_size, "tokens")
        return json_answer({"prompt": state.text.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return await state.in_pool(answer)


@router.get("/tokenizer_info", response_model=None)
async def tokenizer_info(request: Request) -> Response:
    """Its marks by name, and the chat template: whoever writes conversations himself needs no more."""
    state = state_of(request)
    if not state.config.tokenizer_info:
        raise errors.not_shown("--tokenizer-info")
    template = state.text.template
    return json_answer(
        {**state.text.tokenizer.named_tokens, "chat_template": None if template is None else template.source}
    )
