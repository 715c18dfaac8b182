"""`quire bench frontend` and `overload`: this server's own cost, and what it does when it is asked for too much."""

from __future__ import annotations

import asyncio
import contextlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

from .cli_bench_report import JsonFile, ReportFile, Seed, measuring, show, words
from .cli_options import option


def bench_frontend(
    model: Annotated[str, option("Server", "Whose tokenizer and template are used.")] = "bundled",
    streams: Annotated[str, option("Load", "Streams at once; each number is measured.")] = "1,8,64",
    tokens: Annotated[int, option("Load", "Tokens of a stream.", min=1)] = 1000,
    repetitions: Annotated[int, option("Load", "Measurements of each kind; the cheapest is told.", min=1)] = 3,
    json_file: JsonFile = None,
) -> None:
    """Microseconds of the event loop for a streamed token, and tokens a second of one API process."""
    with measuring(json_file):
        from ..bench import frontend

        config = frontend.FrontendConfig(
            model=model, streams=tuple(int(word) for word in words(streams)), tokens=tokens, repetitions=repetitions
        )
        result = frontend.run(config, serve_scripted)
    show(frontend.table(result), result, json_file)


def bench_overload(
    url: Annotated[str, option("Server", "Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, option("Server", "Served name; nothing = the model that the server has.")] = None,
    api_key: Annotated[
        str | None,
        option(
            "Server", "Key, if the server wants one.", envvar=["QUIRE_API_KEY", "OPENAI_API_KEY"], show_default=False
        ),
    ] = None,
    factors: Annotated[str, option("Load", "Multiples of the rate that the server can finish.")] = "1,2,5,10",
    rounds: Annotated[int, option("Load", "Times that all of it is taken, in turn; medians are told.", min=1)] = 1,
    seconds: Annotated[float, option("Load", "Of each trial.")] = 60.0,
    concurrency: Annotated[int, option("Load", "Requests at a time while the peak is found.", min=1)] = 64,
    input_len: Annotated[int, option("Load", "Prompt tokens of a request.", min=1)] = 128,
    output_len: Annotated[int, option("Load", "Output tokens of a request.", min=1)] = 256,
    seed: Seed = 0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """Goodput, refusals and first tokens of a running server at its peak and at multiples of what it can do."""
    with measuring(json_file, report_file) as bar:
        from ..bench import overload

        result = overload.run(
            overload.OverloadConfig(
                url=url,
                model=model,
                api_key=api_key,
                factors=tuple(float(word) for word in words(factors)),
                rounds=rounds,
                seconds=seconds,
                concurrency=concurrency,
                input_len=input_len,
                output_len=output_len,
                seed=seed,
            ),
            bar.show,
        )
    show(overload.table(result), result, json_file, report_file)


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
