"""How /v1/responses spells an answer: items, and the dozen events that tell how they come to be."""

from __future__ import annotations

import time
from typing import Any

from ...engine.tokenizer import Tokenizer
from ...scheduler.plan import TokenLogprob
from .. import errors, sse
from ..block_answer import Ending, Event
from ..blocks import Block, Change, More, Opened
from ..generate import Generation, Usage
from ..logprobs import chat_logprobs, speller
from .body import ResponsesBody

ID_PREFIXES = {"thinking": "rs", "text": "msg", "call": "fc"}
# Of an answer that would have gone on: its status, and the reason that clients have a name for. To end repetition is a
# bound on the output that the request itself has set.
CUT = {
    "length": ("incomplete", "max_output_tokens"),
    "repetition": ("incomplete", "max_output_tokens"),
    "abort": ("cancelled", None),
}


class ResponsesWire:
    """The spelling of one response. Its events are numbered from 0."""

    keep_alive = sse.KEEP_ALIVE

    def __init__(
        self, generation: Generation, body: ResponsesBody, tokenizer: Tokenizer, model: str, label: str
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._spell = speller(tokenizer, as_ids=False)
        self._shown_tokens: dict[int, int] = {}  # of the text of that index, by the events so far
        self._label = label
        self._num_events = 0
        params = generation.request.prompts[0].params
        extras = body.model_extra or {}
        self._head = {
            "id": f"resp_{label}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": body.text.format if body.text and body.text.format else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "background": False,
            "service_tier": "default",
            "prompt_cache_key": extras.get("prompt_cache_key"),
            "safety_identifier": extras.get("safety_identifier"),
            "user": extras.get("user"),
        }

    def begin(self) -> list[Event]:
        response = self._response("in_progress", [])
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def change(self, change: Change) -> list[Event]:
        block = change.block
        if isinstance(change, Opened):
            return self._opened(block)
        if isinstance(change, More):
            return [self._more(block, change.text)]
        return self._closed(block)

    def end(self, row: list[Block], ending: Ending) -> list[Event]:
        kind = "response.incomplete" if ending.is_cut else "response.completed"
        return [self._event(kind, response=self.whole(row, ending))]

    def fail(self, row: list[Block], error: errors.ApiError) -> list[Event]:
        response = self._response("failed", self._output(row))
        response["error"] = {"code": error.code, "message": error.message}
        return [self._event("response.failed", response=response)]

    def whole(self, row: list[Block], ending: Ending) -> dict[str, Any]:
        status, reason = CUT[ending.finish_reason] if ending.is_cut else ("completed", None)
        response = self._response(status, self._output(row))
        if reason is not None:
            response["incomplete_details"] = {"reason": reason}
        if status == "completed":
            response["completed_at"] = int(time.time())
        response["usage"] = usage_dict(self._generation.usage)
        return response

    def _opened(self, block: Block) -> list[Event]:
        added = self._event(
            "response.output_item.added", output_index=block.index, item=self._item(block, "in_progress", is_empty=True)
        )
        if block.kind == "call":
            return [added]
        part = self._part(block, is_empty=True)
        return [added, self._event("response.content_part.added", **self._place(block), part=part)]

    def _more(self, block: Block, text: str) -> Event:
        if block.kind == "call":
            return self._event(
                "response.function_call_arguments.delta",
                item_id=self._item_id(block),
                output_index=block.index,
                delta=text,
            )
        if block.kind == "thinking":
            return self._event("response.reasoning_text.delta", **self._place(block), delta=text)
        shown = self._shown_tokens.get(block.index, 0)
        self._shown_tokens[block.index] = len(block.tokens)
        logprobs = self._logprobs(block.tokens[shown:])
        return self._event("response.output_text.delta", **self._place(block), delta=text, logprobs=logprobs)

    def _closed(self, block: Block) -> list[Event]:
        text = block.text
        if block.kind == "call":
            events = [
                self._event(
                    "response.function_call_arguments.done",
                    item_id=self._item_id(block),
                    output_index=block.index,
                    name=block.name,
                    arguments=text,
                )
            ]
        elif block.kind == "thinking":
            events = [self._event("response.reasoning_text.done", **self._place(block), text=text)]
        else:
            logprobs = self._logprobs(block.tokens)
            events = [self._event("response.output_text.done", **self._place(block), text=text, logprobs=logprobs)]
        if block.kind != "call":
            part = self._part(block)
            events.append(self._event("response.content_part.done", **self._place(block), part=part))
        item = self._item(block, _status(block))
        return [*events, self._event("response.output_item.done", output_index=block.index, item=item)]

    def _event(self, type: str, **fields: Any) -> Event:
        event = {"type": type, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "completed_at": None,
            "usage": None,
        }

    def _output(self, row: list[Block]) -> list[dict[str, Any]]:
        return [self._item(block, _status(block)) for block in row]

    def _item(self, block: Block, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        """is_empty: before its first text"""
        text = "" if is_empty else block.text
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind == "call":
            return item | {"type": "function_call", "call_id": block.id, "name": block.name, "arguments": text}
        content = [] if is_empty else [self._part(block)]
        if block.kind == "thinking":
            return item | {"type": "reasoning", "summary": [], "content": content}
        return item | {"type": "message", "role": "assistant", "content": content}

    def _part(self, block: Block, *, is_empty: bool = False) -> dict[str, Any]:
        """is_empty: before its first text"""
        text = "" if is_empty else block.text
        if block.kind == "thinking":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._logprobs([] if is_empty else block.tokens)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, tokens: list[TokenLogprob]) -> list[dict[str, Any]]:
        spelled: list[dict[str, Any]] = chat_logprobs(self._tokenizer, self._spell, tokens)["content"]
        return spelled

    def _item_id(self, block: Block) -> str:
        return f"{ID_PREFIXES[block.kind]}_{self._label}_{block.index}"

    def _place(self, block: Block) -> dict[str, Any]:
        return {"item_id": self._item_id(block), "output_index": block.index, "content_index": 0}


def _status(block: Block) -> str:
    return "incomplete" if block.is_cut else "completed"


def usage_dict(usage: Usage) -> dict[str, Any]:
    """As decisions spell it too."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
