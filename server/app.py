"""The application: state from a started engine, routes, and one answer to every kind of error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from .. import __version__
from ..engine.chat import load_chat_template
from ..engine.client import EngineClient
from ..engine.errors import QuireError, SettingError
from ..engine.grammar import Grammars, Vocabulary
from ..engine.messages import EngineDead, EngineReady, StepStats
from ..engine.rendering import shared_workers
from ..engine.tokenizer import generation_defaults, load_tokenizer
from ..engine.validation import limits_of
from . import (
    errors,
    logs,
    routes_admin,
    routes_chat,
    routes_completions,
    routes_decisions,
    routes_fleet,
    routes_page,
    routes_render,
    routes_tokenizer,
)
from .admission import Admission
from .auth import Door
from .config import ServerConfig
from .cost import Experience
from .dispatcher import Dispatcher
from .feed import Feed
from .inputs import TextSide
from .keys import Key, KeyRing
from .keys_file import Stamp, follow, load_keys, stamp_of
from .lag import watch_lag
from .life import LifeMetrics
from .logs import logger
from .messages import routes as messages
from .metrics import Metrics
from .middleware import LOOPBACK_HOSTS, Outermost
from .parsing.markup import markup_of
from .registry import Registry
from .responses import routes as responses
from .state import State, state_of
from .throughput import report_throughput
from .tracing import open_tracer


def create_app(client: EngineClient, config: ServerConfig) -> FastAPI:
    """The ASGI application of one engine. Its lifespan starts `client` and closes it.

    Start-up is over, and a port may open, when the engine's settings have turned out to be right; before, it raises
    EngineStartError: an orchestrator sees a failed start, not a sick server. The model is loaded behind an open port,
    where probes and metrics tell how far it is; if that fails, `Life.over` says that nothing will ever be served.
    """
    dispatcher = Dispatcher(client, config.hang_timeout)
    door = Door(KeyRing(config.api_key))
    path = config.api_keys_file

    async def bring_up(app: FastAPI) -> None:
        try:
            if path is not None:
                door.use_keys(load_keys(path))
            app.state.quire = await _start(dispatcher, config, door)
            app.state.feed.shows(app.state.quire)
            if config.otlp_traces_endpoint is not None:
                app.state.tracer = open_tracer(config.otlp_traces_endpoint, app.state.quire.model_names[0])
        except Exception as error:
            if not dispatcher.stopping:
                logger.error("cannot start: %s", error if isinstance(error, QuireError) else logs.where(error))
            app.state.refused = isinstance(error, SettingError)
            dispatcher.life.ends(EngineDead("it could not be started"))
            await dispatcher.stop()
            raise
        dispatcher.life.has_started()

    def use_keys(named: Sequence[Key]) -> None:
        door.use_keys(named)
        app.state.quire.name_tenants()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def chores() -> None:
            await starting
            metrics = app.state.quire.metrics
            following = [] if path is None else [follow(path, seen, use_keys)]
            await asyncio.gather(report_throughput(metrics), watch_lag(metrics), *following)

        seen: Stamp = () if path is None else stamp_of(path)
        starting = asyncio.create_task(bring_up(app))
        settled = asyncio.create_task(dispatcher.settled.wait())
        await asyncio.wait((starting, settled), return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        if starting.done():
            await starting
        working = asyncio.create_task(chores())
        try:
            yield
        finally:
            dispatcher.fail_all(errors.draining())
            await dispatcher.stop()
            working.cancel()
            await asyncio.wait((starting, working))
            if app.state.tracer is not None:
                await asyncio.to_thread(app.state.tracer.close)
            if app.state.quire is not None:
                app.state.quire.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Quire", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    asking = (routes_completions, routes_chat, responses, messages, routes_decisions, routes_render)
    for module in (*asking, routes_tokenizer, routes_admin, routes_fleet, *([routes_page] if config.live_page else [])):
        app.include_router(module.router)
    app.state.quire = None  # until the engine serves
    app.state.refused = False  # the engine cannot be what it was asked to be
    app.state.dispatcher = dispatcher
    app.state.feed = Feed(dispatcher)
    app.state.life_metrics = LifeMetrics(dispatcher.life)
    app.state.door = door
    app.state.tracer = None
    app.add_middleware(Outermost, allowed_hosts=_allowed_hosts(config))
    for kind in (errors.ApiError, QuireError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    return app


async def _start(dispatcher: Dispatcher, config: ServerConfig, door: Door) -> State:
    ready = await dispatcher.start()
    folder = Path(ready.model_path)
    text = await asyncio.to_thread(_text_side, ready, folder, config)
    names = config.served_model_name or (folder.name,)
    metrics = Metrics(ready, names[0], tenants={*ready.tenants, *door.ring.named}, vllm_aliases=config.vllm_metrics)
    experience = Experience(ready)
    admission = Admission(
        ready.max_num_seqs + config.max_queued_requests,
        places=ready.max_num_seqs,
        max_queued_tokens=config.max_queued_tokens,
        max_queue_seconds=config.max_queue_seconds,
    )

    def saw_step(stats: StepStats) -> None:
        metrics.saw_step(stats)
        experience.saw_step(stats)
        admission.saw_step(stats)

    dispatcher.on_stats = saw_step
    _log_facts(ready, names)
    if text.template is not None:
        markup = text.markup
        logger.info(
            "calls of tools are read as %s, thinking as %s",
            markup.syntax.name if markup.syntax else "nothing known",
            f"{markup.tags.start}…{markup.tags.end}" if markup.tags else "nothing apart",
        )
    state = State(
        config=config,
        ready=ready,
        model_names=names,
        created=int(time.time()),
        door=door,
        admission=admission,
        dispatcher=dispatcher,
        metrics=metrics,
        registry=Registry(),
        experience=experience,
        text=text,
        pool=ThreadPoolExecutor(config.text_threads, thread_name_prefix="text"),
    )
    state.name_tenants()
    return state


def _text_side(ready: EngineReady, folder: Path, config: ServerConfig) -> TextSide:
    """Not on the event loop: a large tokenizer takes a second, and probes want their answer."""
    tokenizer = load_tokenizer(folder)
    workers = shared_workers()
    workers.warm(config.text_threads)
    template = load_chat_template(tokenizer, workers.compile)
    grammars = Grammars(lambda: Vocabulary(tokenizer, ready.vocab_size))
    grammars.warm()
    return TextSide(
        tokenizer=tokenizer,
        template=template,
        compile=workers.compile if config.trust_request_chat_template else None,
        limits=limits_of(ready),
        ready=ready,
        defaults=_sampling_defaults(config, folder),
        markup=markup_of(config.tool_call_parser, config.reasoning_parser, template, tokenizer),
        grammars=grammars,
    )


def _sampling_defaults(config: ServerConfig, folder: Path) -> dict[str, float | int]:
    if config.generation_config == "none":
        return {}
    defaults = generation_defaults(folder)
    if defaults:
        listed = ", ".join(f"{name} {value}" for name, value in defaults.items())
        logger.info("defaults for requests that leave them out, from generation_config.json: %s", listed)
    return defaults


def _log_facts(ready: EngineReady, names: tuple[str, ...]) -> None:
    logger.info(
        "model %s: %s, %d parameters, %s on %s, context %d tokens, ready in %.1f s",
        ", ".join(names),
        ready.model_type,
        ready.num_parameters,
        ready.dtype,
        ready.device,
        ready.max_model_len,
        sum(ready.startup_seconds.values()),
    )
    kv_tokens = ready.num_blocks * ready.block_size
    logger.info(
        "KV cache: %d blocks of %d tokens, room for %.1f requests of full length; %d sequences run at once",
        ready.num_blocks,
        ready.block_size,
        kv_tokens / ready.max_model_len,
        ready.max_num_seqs,
    )
    if ready.speculative_tree:
        how = "as deep as pays" if ready.speculative_adaptive else "always to the full depth"
        logger.info("speculation: %s, %s, %s", ready.speculative_method, ready.speculative_tree, how)


def _allowed_hosts(config: ServerConfig) -> frozenset[str]:
    """Bound to loopback, only loopback names: a web page that rebinds its own name to 127.0.0.1 is turned away."""
    if config.allowed_hosts:
        return frozenset(host.lower() for host in config.allowed_hosts)
    return LOOPBACK_HOSTS if config.host in ("localhost", "127.0.0.1", "::1") else frozenset()


async def _answer(request: Request, error: Exception) -> Response:
    headers: Mapping[str, str] = {}
    if isinstance(error, RequestValidationError):
        answer = errors.from_validation(error.errors(), error.body)
    elif isinstance(error, HTTPException):
        answer = errors.from_status(error.status_code)
        headers = error.headers or {}  # 405 says what is allowed
    else:
        answer = error if isinstance(error, errors.ApiError) else errors.from_engine(error)
    if request.app.state.quire is not None:
        state_of(request).metrics.error(answer.status, answer.code)
    request.state.error = answer.code
    response = answer.response(request.scope["path"])
    response.headers.update(headers)
    return response
