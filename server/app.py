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
from ..engine.errors import QuireError
from ..engine.grammar import Grammars, Vocabulary
from ..engine.messages import EngineReady, StepStats
from ..engine.tokenizer import generation_defaults, load_tokenizer
from ..engine.validation import limits_of
from . import errors, logs, routes_admin, routes_chat, routes_completions
from .admission import Admission
from .auth import Door
from .config import ServerConfig
from .cost import Experience
from .dispatcher import Dispatcher
from .inputs import TextSide
from .keys import Key, KeyRing
from .keys_file import Stamp, follow, load_keys, stamp_of
from .lag import watch_lag
from .logs import logger
from .messages import routes as messages
from .metrics import Metrics
from .middleware import LOOPBACK_HOSTS, Outermost
from .parsing.markup import markup_of
from .responses import routes as responses
from .state import State, state_of
from .throughput import report_throughput


def create_app(client: EngineClient, config: ServerConfig) -> FastAPI:
    """The ASGI application of one engine. Its lifespan starts `client` and closes it.

    Start-up raises EngineStartError before any port is open: an orchestrator sees a failed start, not a sick server.
    """

    door = Door(KeyRing(config.api_key))

    def use_keys(named: Sequence[Key]) -> None:
        door.use_keys(named)
        app.state.quire.name_tenants()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        path = config.api_keys_file
        seen: Stamp = ()
        try:
            if path is not None:
                seen = stamp_of(path)
                door.use_keys(load_keys(path))
            state = await _start(client, config, door)
        except Exception as error:
            logger.error("cannot start: %s", error if isinstance(error, QuireError) else logs.where(error))
            raise
        app.state.quire = state
        chores = [asyncio.create_task(report_throughput(state.metrics)), asyncio.create_task(watch_lag(state.metrics))]
        if path is not None:
            chores.append(asyncio.create_task(follow(path, seen, use_keys)))
        try:
            yield
        finally:
            for chore in chores:
                chore.cancel()
            state.dispatcher.fail_all(errors.draining())
            await state.dispatcher.stop()
            state.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Quire", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    for module in (routes_completions, routes_chat, responses, messages, routes_admin):
        app.include_router(module.router)
    app.state.door = door
    app.add_middleware(Outermost, allowed_hosts=_allowed_hosts(config))
    for kind in (errors.ApiError, QuireError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    return app


async def _start(client: EngineClient, config: ServerConfig, door: Door) -> State:
    dispatcher = Dispatcher(client, config.hang_timeout)
    try:
        ready = await dispatcher.start()
        folder = Path(ready.model_path)
        tokenizer = load_tokenizer(folder)
        template = load_chat_template(tokenizer)
        text = TextSide(
            tokenizer=tokenizer,
            template=template,
            limits=limits_of(ready),
            ready=ready,
            defaults=_sampling_defaults(config, folder),
            markup=markup_of(config.tool_call_parser, config.reasoning_parser, template, tokenizer),
            grammars=Grammars(lambda: Vocabulary(tokenizer, ready.vocab_size)),
        )
    except BaseException:
        await dispatcher.stop()
        raise
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
    if template is not None:
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
        experience=experience,
        text=text,
        pool=ThreadPoolExecutor(config.text_threads, thread_name_prefix="text"),
    )
    state.name_tenants()
    return state


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
    state_of(request).metrics.error(answer.status, answer.code)
    response = answer.response(request.scope["path"])
    response.headers.update(headers)
    return response
