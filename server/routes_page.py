"""The live page: its files as they are, and the feed that it draws."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from . import errors
from .feed import Feed
from .keys import ADMIN, METRICS, Key
from .routing import GuardedRoute
from .sse import EventStream

router = APIRouter(route_class=GuardedRoute)

FOLDER = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

# Everything comes from this server, and nothing is inline: what an answer of the model says can be shown, not run.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

FILES = {
    path.name: (path.read_bytes(), KINDS[path.suffix]) for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS
}


@router.get("/", response_model=None)
async def page() -> Response:
    return _file("index.html")


@router.get("/page/{file}", response_model=None)
async def part(file: str) -> Response:
    return _file(file)


@router.get("/steps", response_model=None)
async def steps(request: Request) -> Response:
    """The engine's steps as server-sent events for who accepts these, else the figures of now as one frame."""
    feed: Feed = request.app.state.feed
    caller: Key = request.state.caller
    sees_names = bool(caller.scopes & {METRICS, ADMIN})
    if "text/event-stream" not in request.headers.get("accept", ""):
        return Response(msgspec.json.encode(feed.frame(sees_names=sees_names)), media_type=errors.JSON)
    watcher = feed.watch(sees_names=sees_names)
    return EventStream(watcher.frames(), closing(watcher))


def _file(name: str) -> Response:
    """Of a fixed table: a path cannot lead anywhere else."""
    if name not in FILES:
        raise errors.from_status(404)
    content, kind = FILES[name]
    return Response(content, headers=HEADERS, media_type=kind)
