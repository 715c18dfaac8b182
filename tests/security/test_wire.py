"""What crosses between the processes: typed, and a frame that is no message is refused while the engine lives on."""

from __future__ import annotations

import os
import queue
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from security import fuzz
from security.mutate import mutated_bytes

from quire.engine.config import EngineConfig
from quire.engine.messages import AddRequest, StepOutputs, encoder
from quire.engine.process import ProcessClient
from quire.scheduler.params import SamplingParams

GOOD = AddRequest("good", [1, 2, 3], SamplingParams(max_tokens=5, seed=3))


def test_messages_that_are_nearly_right() -> None:
    tally = fuzz.frames(1500, seed=7)
    assert tally.troubles == []
    assert tally.refused > 500
    assert tally.taken > 50
    assert tally.how["error of its own"] > 10


class Engine:
    """An engine process, and what it says."""

    def __init__(self, model: Path) -> None:
        self.client = ProcessClient(EngineConfig(model=str(model), dtype="float32", threads=1, max_model_len=96))
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.client.start(self.said.put)

    def answer(self, request_id: str) -> tuple[list[int], str | None]:
        """Tokens and error of a request that has been sent."""
        ids: list[int] = []
        end = time.monotonic() + 120
        while time.monotonic() < end:
            message = self.said.get(timeout=120)
            for chunk in message.chunks if isinstance(message, StepOutputs) else ():
                if chunk.request_id == request_id:
                    ids += chunk.token_ids
                    if chunk.finish_reason is not None:
                        return ids, chunk.error
        raise AssertionError("no end")


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    made = Engine(tiny_model)
    yield made
    made.client.close()


def frames() -> Iterator[bytes]:
    yield from (b"", b"\x00", b"\xc1", b"\xff" * 100, b"x" * (1 << 20), b"\x91" * 100_000, b"\x81\xa4type\xa3add")
    yield b"cos\nsystem\n(S'true'\ntR."  # a pickle
    yield b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."
    yield msgspec.msgpack.encode({"type": "add"})
    yield msgspec.msgpack.encode({"type": "launch-missiles"})
    yield msgspec.msgpack.encode({"type": "abort", "request_ids": ["\x00" * 100, ""]})
    yield encoder.encode(GOOD).replace(b"good", b"\xff\xff\xff\xff")
    rng = random.Random(2)
    data = encoder.encode(AddRequest("mutant", [1], SamplingParams(max_tokens=1)))
    for _ in range(500):
        mutant = mutated_bytes(rng, data)
        if b"shutdown" not in mutant:
            yield mutant


@pytest.mark.advisory(
    *("CVE-2024-9052", "CVE-2024-9053", "CVE-2024-11041", "CVE-2025-29783", "CVE-2025-30165", "CVE-2025-32444"),
    *(
        "CVE-2025-47277",
        "CVE-2026-3059",
        "CVE-2026-3060",
        "CVE-2026-3989",
        "CVE-2026-76850",
        "CVE-2026-34159",
        "CVE-2026-118375",
    ),
)
def test_frames_of_any_kind_leave_the_engine_as_it_was(engine: Engine) -> None:
    client: Any = engine.client
    pid = client.pid
    client.send(GOOD)
    alone = engine.answer("good")
    for frame in frames():
        with client._down_lock:
            client._down.send(frame)
    client.send(msgspec.structs.replace(GOOD, request_id="after"))
    assert engine.answer("after") == alone
    assert client.pid == pid
    os.kill(pid, 0)


def test_the_decoders_name_what_they_refuse() -> None:
    """Of all frames above; nothing but these three errors, so that whoever decodes can catch them."""
    from quire.engine.messages import down_decoder, up_decoder

    for frame in frames():
        for decoder in (down_decoder, up_decoder):
            try:
                decoder.decode(frame)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
