"""`quire bench frontend`: this server's own cost, with a scripted engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

from .cli_bench_report import JsonFile, measuring, show, words
from .cli_options import option


def bench_frontend(
    model: Annotated[str, option("Server", "Whose tokenizer and template are used.")] = "bundled",
    streams: Annotated[str, option("Load", "Streams at once; each number is measured.")] = "1,8,64",
    tokens: Annotated[int, option("Load", "Tokens of a stream.", min=1)] = 1000,
    repetitions: Annotated[int, option("Load", "Measurements of each kind; the cheapest is told.", min=1)] = 3,
    json_file: JsonFile = None,
) -> None:
    """Microseconds of the event loop for a streamed token, and tokens a second of one API process."""
    with measuring():
        from ..bench import frontend

        config = frontend.FrontendConfig(
            model=model, streams=tuple(int(word) for word in words(streams)), tokens=tokens, repetitions=repetitions
        )
        result = frontend.run(config, serve_scripted)
    show(frontend.table(result), result, json_file)


def serve_scripted(parent: Connection, folder: Path, text_ids: list[int], vocab_size: int) -> None:
    """The server's process: sends its port to `parent`, and serves until that closes."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(parent, folder, text_ids, vocab_size))


async def _serve(parent: Connection, folder: Path, text_ids: list[int], vocab_size: int) -> None:
    import uvicorn

    from ..bench.scripted import ScriptedEngine
    from .app import create_app
    from .config import ServerConfig
    from .http_protocol import BoundedProtocol

    engine = ScriptedEngine(folder, text_ids, vocab_size, asyncio.get_running_loop())
    config = uvicorn.Config(
        create_app(engine, ServerConfig()),
        port=0,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        parent.send(server.servers[0].sockets[0].getsockname()[1])
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(parent.recv)
        server.should_exit = True
    await serving
