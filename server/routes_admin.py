"""What is served, and whether it is well."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .. import __version__
from . import life
from .description import described
from .json_answer import json_answer
from .metrics import CONTENT_TYPE
from .routing import GuardedRoute
from .state import State, life_of, state_of

router = APIRouter(route_class=GuardedRoute)


@router.get("/v1/models", response_model=None)
async def list_models(request: Request) -> Response:
    state = state_of(request)
    return json_answer({"object": "list", "data": [_model(state, name) for name in state.model_names]})


@router.get("/v1/models/{model:path}", response_model=None)
async def show_model(model: str, request: Request) -> Response:
    state = state_of(request)
    return json_answer(_model(state, state.model_name(model)))


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    return _answer(life.health(life_of(request)))


@router.get("/ready", response_model=None)
async def ready(request: Request) -> Response:
    state = request.app.state.quire
    return _answer(life.ready(life_of(request), draining=state is not None and state.admission.draining))


@router.get("/live", response_model=None)
async def live(request: Request) -> Response:
    return _answer(life.live(life_of(request)))


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """While the engine starts, of its life alone."""
    state = request.app.state.quire
    text = request.app.state.life_metrics.render() + (b"" if state is None else state.metrics.render())
    return Response(text, media_type=CONTENT_TYPE)


@router.get("/version", response_model=None)
async def version(request: Request) -> Response:
    """What runs here, as resolved at the start."""
    state = state_of(request)
    facts = msgspec.structs.asdict(state.ready)
    for private in ("model_path", "tenants", "tenant_weights"):  # this route is open to everybody
        del facts[private]
    return json_answer({"version": __version__, "model": state.model_names[0], **facts})


@router.get("/openapi.json", response_model=None)
async def openapi(request: Request) -> Response:
    return json_answer(described(request.app))


def _model(state: State, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "quire",
        "root": state.model_names[0],
        "parent": None,
        "max_model_len": state.ready.max_model_len,
    }


def _answer(report: life.Report) -> Response:
    return json_answer(report.body, report.status, report.headers)
