"""What one streamed token costs the API process: CPU time of the event loop's thread, with a scripted engine.

    python tests/api/measure_token_cost.py

The engine's thread and the reading client (a process of its own) are not counted.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn

sys.path.insert(0, str(Path(__file__).parent))
from conftest import FakeClient, make_folder

from quire.server.app import create_app
from quire.server.config import ServerConfig
from quire.server.http_protocol import BoundedProtocol

TOKENS = 400  # of one stream; the scripted model's context is 512
CASES = (
    ("/v1/completions", {}),
    ("/v1/chat/completions", {}),
    ("/v1/completions", {"stop": ["zzz"]}),
    ("/v1/completions", {"logprobs": 1}),
)


async def _read_stream(port: int, path: str, fields: dict) -> None:
    body = {"max_tokens": TOKENS, "stream": True, **fields}
    body |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    content = json.dumps(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
    answer = await reader.read()
    writer.close()
    if not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        raise RuntimeError(f"not a whole stream: {answer[-200:]!r}")


def read_streams(port: int, path: str, fields: dict, streams: int) -> None:
    """The client process."""

    async def read_all() -> None:
        await asyncio.gather(*(_read_stream(port, path, fields) for _ in range(streams)))

    asyncio.run(read_all())


def measure(server: uvicorn.Server, port: int) -> None:
    """Drives the server, which runs on the main thread, and prints the table."""
    while not server.started:
        time.sleep(0.05)
    clock = time.pthread_getcpuclockid(threading.main_thread().ident)
    spawn = multiprocessing.get_context("spawn")
    for path, fields in CASES:
        for streams in (1, 8, 32):
            client = spawn.Process(target=read_streams, args=(port, path, fields, streams))
            before = time.clock_gettime(clock)
            client.start()
            client.join()
            spent = time.clock_gettime(clock) - before
            per_token = spent * 1e6 / (streams * TOKENS)
            print(f"{path} {json.dumps(fields)} {streams:3d} streams: {per_token:6.1f} µs per token")
    server.should_exit = True


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeClient(make_folder(Path(folder) / "tiny"))
        fake.answer = lambda request, index: [97] * request.params.max_tokens
        fake.step_seconds = 0.002
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        app = create_app(fake, ServerConfig())
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", http=BoundedProtocol, ws="none")
        server = uvicorn.Server(config)
        threading.Thread(target=measure, args=(server, listener.getsockname()[1])).start()
        server.run([listener])


if __name__ == "__main__":
    main()
