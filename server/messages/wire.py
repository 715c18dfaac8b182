"""How /v1/messages spells an answer: one message of blocks, and the events that tell how it comes to be."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from .. import errors
from ..block_answer import Ending, Event
from ..blocks import Block, Change, More, Opened
from ..generate import Generation, Usage

# What clients call an answer that would have gone on, also where it was aborted or repeated itself: "pause_turn" would
# have agents send it again.
CUT = "max_tokens"


class MessagesWire:
    """The spelling of one message."""

    keep_alive = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, generation: Generation, model: str, label: str) -> None:
        self._generation = generation
        self._head = {"id": f"msg_{label}", "type": "message", "role": "assistant", "model": model}

    def begin(self) -> list[Event]:
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }
        return [{"type": "message_start", "message": message}]

    def change(self, change: Change) -> list[Event]:
        block = change.block
        if isinstance(change, Opened):
            return [{"type": "content_block_start", "index": block.index, "content_block": _spelled(block, "")}]
        if isinstance(change, More):
            return [{"type": "content_block_delta", "index": block.index, "delta": _delta(block, change.text)}]
        return [{"type": "content_block_stop", "index": block.index}]

    def end(self, row: list[Block], ending: Ending) -> list[Event]:
        return [
            {"type": "message_delta", "delta": _stop(row, ending), "usage": self._usage()},
            {"type": "message_stop"},
        ]

    def fail(self, row: list[Block], error: errors.ApiError) -> list[Event]:
        return [error.body(errors.ANTHROPIC)]

    def whole(self, row: list[Block], ending: Ending) -> dict[str, Any]:
        content = [_spelled(block, block.text) for block in row]
        return {**self._head, "content": content, **_stop(row, ending), "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        """So far. What came from the cache is not counted as input beside."""
        usage: Usage = self._generation.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens or 0},
        }


def _spelled(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "call":
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": _input(text)}
    if block.kind == "thinking":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _input(text: str) -> dict[str, Any]:
    """Arguments as an object, as far as they go: Anthropic's client reads those of a stream by the same rule."""
    try:
        value = from_json(text, allow_partial=True) if text else {}
    except ValueError:  # the model has written what is no JSON
        return {}
    return value if isinstance(value, dict) else {}


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "call":
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind == "thinking":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def _stop(row: list[Block], ending: Ending) -> dict[str, Any]:
    """Why it ended, and at which of the caller's stop sequences."""
    if isinstance(ending.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": ending.stop_reason}
    if ending.is_cut:
        return {"stop_reason": CUT, "stop_sequence": None}
    calls = any(block.kind == "call" for block in row)
    return {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
