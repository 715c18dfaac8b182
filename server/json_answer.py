"""An answer that is one JSON value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from .errors import JSON


def json_answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """What JSON has no spelling of, such as a path, is written as text."""
    return Response(msgspec.json.encode(content, enc_hook=str), status, headers, JSON)
