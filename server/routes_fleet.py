"""What those ask who run this server beside others: its load, its settings, and to end requests by name."""

from __future__ import annotations

from dataclasses import asdict

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .. import __version__
from .json_answer import json_answer
from .keys import ADMIN, Key
from .load import load_of
from .protocol import AbortBody
from .routing import GuardedRoute
from .state import state_of

router = APIRouter(route_class=GuardedRoute)

# Of the settings: keys, and where things lie on this machine.
PRIVATE = frozenset({"api_key", "api_keys_file"})


@router.get("/load", response_model=None)
async def load(request: Request) -> Response:
    """`server_load`: requests that are in here, waiting or running."""
    state = state_of(request)
    return json_answer({"server_load": state.admission.requests, **load_of(state.metrics.stats)})


@router.get("/server_info", response_model=None)
async def server_info(request: Request) -> Response:
    """What the server was told, and what the engine made of it."""
    state = state_of(request)
    settings = {name: value for name, value in asdict(state.config).items() if name not in PRIVATE}
    engine = msgspec.structs.asdict(state.ready)
    del engine["model_path"]
    return json_answer({"version": __version__, "models": state.model_names, "settings": settings, "engine": engine})


@router.post("/abort_requests", response_model=None)
async def abort_requests(body: AbortBody, request: Request) -> Response:
    """End requests of the caller's own, or an admin anybody's: what was drawn is answered, and says "abort"."""
    caller: Key = request.state.caller
    owner = None if ADMIN in caller.scopes else caller.name
    return json_answer({"aborted": state_of(request).registry.abort(owner, body.request_ids)})
