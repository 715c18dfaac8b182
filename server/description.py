"""The description at /openapi.json: routes and bodies as the types say, keys and errors as they are here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from .auth import POLICIES

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
# For what is wrong FastAPI describes an answer of its own, which is never given.
_FASTAPIS = ("HTTPValidationError", "ValidationError")


def described(app: FastAPI) -> dict[str, Any]:
    """Made once."""
    if app.openapi_schema is None:
        _complete(app.openapi())
    return app.openapi()


def _complete(description: dict[str, Any]) -> None:
    parts = description["components"]
    for name in _FASTAPIS:
        parts["schemas"].pop(name, None)
    parts["schemas"]["Error"] = _ERROR
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    refusal = {
        "description": "Refused, and why.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    declared = {path.replace(":path", ""): policy for path, policy in POLICIES.items()}
    for path, methods in description["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= {"4XX": refusal, "5XX": refusal}
            if declared[path].scope is not None:
                operation["security"] = [{"key": []}]
