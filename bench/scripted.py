"""An engine that computes nothing: it says one text over and over, a token of every request a step.

What is in front of it is measured with it. A step's message is encoded and decoded as one that crosses between
processes; the next follows as soon as the event loop has taken that one in, so that it is never the engine that anybody
waits for, and every step finds the news of the one before it gone.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..engine.messages import (
    Abort,
    AddRequest,
    Chunk,
    EngineDead,
    EngineReady,
    StepOutputs,
    StepStats,
    Watch,
    encoder,
    up_decoder,
)

MAX_MODEL_LEN = 1 << 20


@dataclass(slots=True)
class _Running:
    request: AddRequest
    said: int = 0


class ScriptedEngine:
    """See `engine.client.EngineClient`. Says `text_ids` from their beginning, repeated up to each max_tokens."""

    def __init__(self, folder: Path, text_ids: list[int], vocab_size: int, loop: asyncio.AbstractEventLoop) -> None:
        self._folder = folder
        self._text_ids = text_ids
        self._vocab_size = vocab_size
        self._loop = loop
        self._inbox: queue.SimpleQueue[AddRequest | Abort | None] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._room = threading.Semaphore(1)
        self._stats = StepStats(kv_blocks_total=1)

    def start(self, on_message: Callable[[StepOutputs | EngineDead], None]) -> EngineReady:
        self._on_message = on_message
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return EngineReady(
            model_path=str(self._folder),
            model_type="scripted",
            num_parameters=0,
            dtype="none",
            device="none",
            vocab_size=self._vocab_size,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=1024,
            max_num_batched_tokens=8192,
            max_n=1,
            scheduling_policy="fcfs",
            tenants=[],
            step_cost=[],
            max_logprobs=0,
            block_size=16,
            num_blocks=1,
            eos_token_ids=[],
            kernels={},
            reasons={},
            startup_seconds={},
            memory_bytes={},
        )

    def send(self, message: AddRequest | Abort | Watch) -> None:
        if not isinstance(message, Watch):
            self._inbox.put(message)

    def kill(self) -> None:
        self.close()

    def heartbeat_age(self) -> float:
        return 0.0

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            while not self._running or not self._inbox.empty():
                message = self._inbox.get()
                if message is None:
                    return
                if isinstance(message, AddRequest):
                    self._stats.requests_total += 1
                    self._running[message.request_id] = _Running(message)
                else:
                    for request_id in message.request_ids:
                        self._running.pop(request_id, None)
            # With a limit: the loop may have stopped turning, and then close() is waiting.
            if self._room.acquire(timeout=1.0):
                self._step()

    def _step(self) -> None:
        chunks = [self._chunk(running) for running in self._running.values()]
        for chunk in chunks:
            if chunk.finish_reason is not None:
                del self._running[chunk.request_id]
        self._stats.steps_total += 1
        self._stats.running = self._stats.step_seqs = self._stats.step_tokens = len(chunks)
        self._stats.generated_tokens_total += len(chunks)
        message = up_decoder.decode(encoder.encode(StepOutputs(chunks, self._stats)))
        assert isinstance(message, StepOutputs)
        self._on_message(message)
        self._loop.call_soon_threadsafe(self._room.release)

    def _chunk(self, running: _Running) -> Chunk:
        token_id = self._text_ids[running.said % len(self._text_ids)]
        running.said += 1
        ends = running.said >= running.request.params.max_tokens
        return Chunk(running.request.request_id, 0, [token_id], finish_reason="length" if ends else None)
