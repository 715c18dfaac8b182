"""One streaming request, timed; and the few questions asked of a server before and after a load."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from .dataset import Ask
from .metrics import Record
from .sse import EventReader

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
DONE = b"[DONE]"
DETAIL_LENGTH = 300  # characters kept of what a server says about a failure


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta or Delta()
        return bool(self.text or delta.content or delta.reasoning or delta.reasoning_content)


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Problem(msgspec.Struct):
    message: str = ""
    type: str | None = None


class Event(msgspec.Struct):
    """One event of either endpoint; fields that the measurement does not need are not decoded."""

    choices: list[Choice] = field(default_factory=list)
    usage: Usage | None = None
    error: Problem | str | None = None


decode_event = msgspec.json.Decoder(Event).decode


class ServerError(Exception):
    """The server cannot be measured: not there, or it refused a question. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    base_url: str  # without a trailing slash and without /v1
    endpoint: str
    model: str
    extra_body: Mapping[str, Any]  # sampling parameters, the same in every request
    headers: Mapping[str, str]


def request_body(ask: Ask, target: Target) -> dict[str, Any]:
    """The JSON to post. Raises ValueError when the ask has no form at this endpoint."""
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": ask.output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra_body,
        **ask.fields,
    }
    if target.endpoint == CHAT:
        if ask.token_ids is not None:
            raise ValueError(f"{CHAT} takes text, not token ids; use --endpoint {COMPLETIONS}")
        body["messages"] = list(ask.messages) if ask.messages else [{"role": "user", "content": ask.text}]
    else:
        if ask.messages is not None:
            raise ValueError(f"{target.endpoint} takes prompts, not messages; use --endpoint {CHAT}")
        body["prompt"] = list(ask.token_ids) if ask.token_ids is not None else ask.text
    return body


async def send(session: aiohttp.ClientSession, target: Target, ask: Ask, due: float | None = None) -> Record:
    """Send one request and read its stream to the end. Failures are told in the record, never raised.

    A stream that breaks the protocol counts as failed: no usage, no finish reason, no [DONE], or with `ignore_eos`
    another number of tokens than asked for.
    """
    body = msgspec.json.encode(request_body(ask, target))
    headers = {"Content-Type": "application/json", **target.headers}
    sent = time.perf_counter()
    record = Record(due=sent if due is None else due, sent=sent, last=sent)
    try:
        async with session.post(target.base_url + target.endpoint, data=body, headers=headers) as response:
            if response.status == 200:
                await _read_stream(response, record)
            else:
                record.error = f"HTTP {response.status}"
                record.detail = (await response.text())[:DETAIL_LENGTH]
    except TimeoutError:
        record.error = "timeout"
    except (aiohttp.ClientError, OSError) as error:
        record.error, record.detail = f"connection: {type(error).__name__}", str(error)[:DETAIL_LENGTH]
    except msgspec.DecodeError as error:
        record.error, record.detail = "malformed event", str(error)[:DETAIL_LENGTH]
    if record.error is None and target.extra_body.get("ignore_eos") and record.output_tokens != ask.output_len:
        record.error = "wrong length"
        record.detail = f"asked for {ask.output_len} tokens with ignore_eos, usage says {record.output_tokens}"
    return record


async def _read_stream(response: aiohttp.ClientResponse, record: Record) -> None:
    reader, usage, done = EventReader(), None, False
    async for piece in response.content.iter_any():
        now = time.perf_counter()
        for data in reader.feed(piece):
            if data == DONE:
                done = True
                continue
            event = decode_event(data)
            if event.error is not None:
                problem = Problem(event.error) if isinstance(event.error, str) else event.error
                record.error, record.detail = "stream error", problem.message[:DETAIL_LENGTH]
                return
            usage = event.usage or usage
            for choice in event.choices:
                record.last = now
                if choice.has_text:
                    record.chunk_times.append(now)
                record.finish_reason = choice.finish_reason or record.finish_reason
    if usage is not None:
        record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens
        record.cached_tokens = (usage.prompt_tokens_details or PromptDetails()).cached_tokens or 0
    missing = {"no finish_reason": record.finish_reason is None, "no usage": usage is None, "no [DONE]": not done}
    record.error = next((kind for kind, found in missing.items() if found), None)


async def served_model(session: aiohttp.ClientSession, base_url: str, wanted: str | None) -> tuple[str, int | None]:
    """(name, max_model_len or None if it is not told) of the model to ask; None and "bundled" mean the one served."""
    try:
        async with session.get(base_url + "/v1/models") as response:
            if response.status == 401:
                raise ServerError(f"{base_url} wants an API key: set QUIRE_API_KEY or pass --api-key")
            response.raise_for_status()
            cards = (await response.json())["data"]
    except aiohttp.ClientConnectorError as error:
        raise ServerError(f"No server answers at {base_url}. Start one in another terminal:  quire serve") from error
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
        raise ServerError(f"{base_url}/v1/models does not answer like an OpenAI server: {error!r}") from error
    names = [card["id"] for card in cards]
    if wanted in (None, "bundled") and names:
        wanted = "bundled" if "bundled" in names else names[0]
    for card in cards:
        if card["id"] == wanted:
            return card["id"], card.get("max_model_len")
    raise ServerError(f"--model {wanted}: the server has {', '.join(names) or 'no model'}")


async def tokenize(session: aiohttp.ClientSession, base_url: str, model: str, text: str) -> list[int]:
    """Ids of `text` without special tokens, by the server's own tokenizer."""
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    async with session.post(base_url + "/tokenize", json=body) as response:
        if response.status != 200:
            raise ServerError(
                f"{base_url}/tokenize answered HTTP {response.status}; without it token lengths cannot be made. "
                "Use --dataset FILE with texts and max_tokens."
            )
        return list((await response.json())["tokens"])


async def metrics_text(session: aiohttp.ClientSession, base_url: str) -> str | None:
    """What /metrics says, None where there is none."""
    try:
        async with session.get(base_url + "/metrics") as response:
            return await response.text() if response.status == 200 else None
    except (TimeoutError, aiohttp.ClientError):
        return None
