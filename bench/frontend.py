"""What one API process spends on a streamed token, and how many it can write a second: `quire bench frontend`.

    scripted engine ──▶ event loop of a server process ──sockets──▶ this process, which reads and checks every byte

Each of N streams gets a token a step, as fast as the event loop takes steps in, so the loop is what there is too little
of. Processor time is read from /proc: of the loop's thread, and of the whole process, where the scripted engine and the
decoding of its messages are counted too. Wall time depends on what else the machine does; processor time hardly.
"""

from __future__ import annotations

import json
import multiprocessing
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.table import Table

from ..engine.tokenizer import load_tokenizer
from .client import CHAT, COMPLETIONS, ServerError
from .dataset import POOL_TEXT

# Runs in the server's process: serves a scripted engine that says these ids, sends its port, returns when told to stop.
Serve = Callable[[Connection, Path, list[int], int], None]

ENDPOINTS = {"completions": COMPLETIONS, "chat": CHAT}
READ_BYTES = 1 << 18
START_SECONDS = 120.0
SILENCE_SECONDS = 120.0  # no stream says anything: the server has stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendConfig:
    """What to measure; names and meanings as on the command line."""

    model: str = "bundled"
    streams: tuple[int, ...] = (1, 8, 64)
    tokens: int = 1000
    repetitions: int = 3

    def __post_init__(self) -> None:
        if not self.streams or min(self.streams) < 1:
            raise ValueError(f"--streams {self.streams}: each must be at least 1")


@dataclass(frozen=True, slots=True)
class Cost:
    """One measurement. Events: how many the tokens came in; as many as there are tokens unless the loop fell behind."""

    endpoint: str
    streams: int
    tokens: int
    events: int
    wall_seconds: float
    loop_seconds: float
    process_seconds: float

    @property
    def loop_us(self) -> float:
        """Processor time of the event loop's thread for an event, microseconds."""
        return 1e6 * self.loop_seconds / self.events

    @property
    def process_us(self) -> float:
        """Of the whole process, the scripted engine included."""
        return 1e6 * self.process_seconds / self.events

    @property
    def events_per_second(self) -> float:
        return self.events / self.wall_seconds


def run(config: FrontendConfig, serve: Serve) -> dict[str, Any]:
    """The measurements, each the one with the least processor time of its repetitions. Raises ServerError."""
    from ..engine.loader import locate_model

    folder = locate_model(config.model)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(POOL_TEXT, add_special_tokens=False)
    repeats = config.tokens // len(ids) + 1
    expected = tokenizer.decode((ids * repeats)[: config.tokens], skip_special_tokens=True)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, folder, ids, max(ids) + 1))
    server.start()
    theirs.close()
    try:
        if not ours.poll(START_SECONDS):
            raise ServerError(f"the server has not started in {START_SECONDS:g} s")
        port = ours.recv()
        repetitions = range(config.repetitions)
        costs = []
        for name in ENDPOINTS:
            for streams in config.streams:
                runs = [_measure(server.pid or 0, port, name, streams, config.tokens, expected) for _ in repetitions]
                costs.append(min(runs, key=lambda cost: cost.loop_us))
    except EOFError:
        raise ServerError("the server could not start") from None
    finally:
        ours.close()
        server.join()
    return {"settings": asdict(config), "measurements": [_row(cost) for cost in costs]}


def _row(cost: Cost) -> dict[str, Any]:
    return {
        **asdict(cost),
        "loop_us": cost.loop_us,
        "process_us": cost.process_us,
        "events_per_second": cost.events_per_second,
    }


def table(result: dict[str, Any]) -> Table:
    titles = ("endpoint", "streams", "loop µs per token", "process µs per token", "tokens/s", "events per token")
    shown = Table(*titles)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in result["measurements"]:
        shown.add_row(
            row["endpoint"],
            str(row["streams"]),
            f"{row['loop_us']:.1f}",
            f"{row['process_us']:.1f}",
            f"{row['events_per_second']:.0f}",
            f"{row['events'] / row['tokens']:.2f}",
        )
    return shown


def _measure(pid: int, port: int, name: str, streams: int, tokens: int, expected: str) -> Cost:
    request = _request(ENDPOINTS[name], tokens)
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
    before = _processor_seconds(pid)
    start = time.perf_counter()
    for connection in connections:
        connection.sendall(request)
    answers = _read_all(connections)
    wall = time.perf_counter() - start
    after = _processor_seconds(pid)
    events = sum(_checked(answer, expected) for answer in answers)
    return Cost(name, streams, streams * tokens, events, wall, after[0] - before[0], after[1] - before[1])


def _request(path: str, tokens: int) -> bytes:
    body: dict[str, Any] = {"max_tokens": tokens, "stream": True}
    body |= {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _read_all(connections: Sequence[socket.socket]) -> list[bytes]:
    """What each says until it closes."""
    answers = {connection: bytearray() for connection in connections}
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(SILENCE_SECONDS)
            if not ready:
                raise ServerError(f"no stream has said anything for {SILENCE_SECONDS:g} s")
            for key, _ in ready:
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                data = connection.recv(READ_BYTES)
                answers[connection] += data
                if not data:
                    selector.unregister(connection)
                    connection.close()
    return [bytes(answer) for answer in answers.values()]


def _checked(answer: bytes, expected: str) -> int:
    """How many events carried text. Raises ServerError if the answer is not the whole text, well-formed."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise ServerError(f"the server answered {answer[:200]!r}")
    frames = _dechunked(rest).split(b"\n\n")
    texts = []
    for frame in frames[:-2]:
        (choice,) = json.loads(frame.removeprefix(b"data: "))["choices"]
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        if text:
            texts.append(text)
    if frames[-2:] != [b"data: [DONE]", b""] or "".join(texts) != expected:
        raise ServerError(f"a stream is not what the engine said; it ends with {answer[-200:]!r}")
    return len(texts)


def _dechunked(body: bytes) -> bytes:
    parts, at = [], 0
    while True:
        end = body.find(b"\r\n", at)
        size = int(body[at:end] or b"0", 16) if end >= 0 else 0
        if not size:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def _processor_seconds(pid: int) -> tuple[float, float]:
    """(of the main thread, which is the event loop's; of all threads)"""
    by_thread = {task.name: _nanoseconds(task) for task in Path(f"/proc/{pid}/task").iterdir()}
    return by_thread[str(pid)] / 1e9, sum(by_thread.values()) / 1e9


def _nanoseconds(task: Path) -> int:
    """Time on a processor: the first field of schedstat, far finer than the ticks of stat."""
    return int((task / "schedstat").read_text().split()[0])
