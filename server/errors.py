"""One shape for everything that is refused: OpenAI's nested error body, or Anthropic's, from a fixed catalogue.

The caller learns the field, the value and the remedy; never a path, an address, a traceback or a class name.
A validation error is 400, never 422: that is what OpenAI's clients branch on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from ..engine.errors import EngineDeadError, RequestError, TooLongError

JSON = "application/json"
ANTHROPIC = "/v1/messages"  # where paths of Anthropic's API begin
MAX_RETRY_SECONDS = 3600
SHOWN_CHARS = 60  # of a refused value: enough to recognise it, too little to fill a log or echo a prompt


class ApiError(Exception):
    """An answer that is not a completion.

    code         stable, for programs; also the `reason` label of the error counter
    param        the field at fault, in the caller's spelling
    retry_after  seconds after which the same request may succeed: the answer carries Retry-After
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self, path: str = "") -> dict[str, Any]:
        """In the shape of the API that `path` belongs to: OpenAI's, unless it is Anthropic's."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        if path.startswith(ANTHROPIC):
            return {"type": "error", "error": {**error, "type": _ANTHROPIC_TYPES.get(self.status, self.type)}}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        if self.retry_after is not None:
            return {"Retry-After": str(_whole_seconds(self.retry_after)), "x-should-retry": "true"}
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status in (409, 429, 504):  # for good, and clients would come back by themselves
            return {"x-should-retry": "false"}
        return {}

    def response(self, path: str = "") -> Response:
        return Response(msgspec.json.encode(self.body(path)), self.status, self.headers(), JSON)


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

_ANTHROPIC_TYPES = {
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}


def invalid(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, code="invalid_value", param=param)


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="unsupported_parameter", param=param)


def too_many_connections(limit: int) -> ApiError:
    message = (
        f"This server holds as many connections as it may: {limit}. Close those that you do not use, and try again."
    )
    return ApiError(503, message, code="too_many_connections", retry_after=random.uniform(1, 4))


def too_many_watchers(limit: int) -> ApiError:
    message = f"As many watch the engine's steps as may: {limit}. Close a page that shows them, and try again."
    return ApiError(503, message, code="too_many_watchers", retry_after=random.uniform(5, 15))


def unauthorized() -> ApiError:
    message = "Missing or wrong API key. Send it as `Authorization: Bearer KEY`."
    return ApiError(401, message, code="invalid_api_key")


def expired_key() -> ApiError:
    return ApiError(401, "This API key has expired; ask the server's owner for a new one.", code="expired_api_key")


def too_many_attempts(wait: float) -> ApiError:
    message = "Too many requests with a wrong API key came from this address. Wait before you send another."
    return ApiError(429, message, code="too_many_attempts", retry_after=wait)


def missing_scope(scope: str) -> ApiError:
    message = f"This API key lacks the scope `{scope}`. Use one whose entry in the server's keys file has it."
    return ApiError(403, message, code="missing_scope")


def foreign_tenant(name: str) -> ApiError:
    message = (
        f"`tenant` is {shown(name)}, which is not the tenant of this API key: leave it out, or use a key with the "
        "scope `tenant`."
    )
    return ApiError(403, message, code="tenant_not_allowed", param="tenant")


def too_urgent(priority: int, least: int) -> ApiError:
    message = f"`priority` is {priority}, and this API key may have {least} or more (lower numbers run first)."
    return ApiError(403, message, code="priority_not_allowed", param="priority")


def rate_limited(limit: str, retry_after: float) -> ApiError:
    """`limit`: what the key may have, in words."""
    message = f"This API key may have {limit}. Try again in {max(retry_after, 1.0):.0f} s."
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=retry_after)


def larger_than_quota(tokens: int, limit: int) -> ApiError:
    """A request that no waiting lets in."""
    message = (
        f"This request may come to {tokens} tokens, prompt and answers together, and this API key has {limit} a "
        "minute: lower `max_tokens` or `n`, or send a shorter prompt."
    )
    return ApiError(429, message, code="rate_limit_exceeded")


def model_not_found(name: str) -> ApiError:
    return ApiError(404, f"The model `{shown(name)}` does not exist.", code="model_not_found", param="model")


def missing(param: str) -> ApiError:
    return ApiError(400, f"`{param}` is required, and not empty.", code="missing_parameter", param=param)


def not_shown(option: str) -> ApiError:
    """`option`: with which the server would have to be started."""
    return ApiError(404, f"This server does not show this; one started with `{option}` does.", code="not_found")


def host_not_allowed() -> ApiError:
    return ApiError(403, "This Host name is not served here.", code="host_not_allowed")


def invalid_http() -> ApiError:
    return ApiError(400, "This is not a valid HTTP request.", code="invalid_http")


def headers_too_large(size: int, count: int) -> ApiError:
    message = f"The request's headers are larger than {size} bytes or more than {count}."
    return ApiError(431, message, code="headers_too_large")


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")


def body_too_slow(seconds: float) -> ApiError:
    return ApiError(408, f"The request body took longer than {seconds:g} seconds.", code="request_too_slow")


def unsupported_media_type(what: str) -> ApiError:
    return ApiError(415, f"Unsupported Media Type: {what}", code="unsupported_media_type")


def overloaded(why: str, wait: float, retry_after: float) -> ApiError:
    """`wait`: predicted seconds in the queue of a request that were let in now."""
    message = f"The server's queue is full: {why}. {_outlook(wait, retry_after)}"
    return ApiError(503, message, code="server_overloaded", retry_after=retry_after)


def tenant_overloaded(why: str, wait: float, retry_after: float) -> ApiError:
    """The queue is full because of this tenant alone."""
    message = (
        f"The server's queue is full and this tenant holds more than its share of it: {why}. "
        f"{_outlook(wait, retry_after)}"
    )
    return ApiError(429, message, code="tenant_overloaded", retry_after=retry_after)


def _outlook(wait: float, retry_after: float) -> str:
    return f"A new request would wait about {wait:.1f} s; there is room again in about {max(retry_after, 1.0):.0f} s."


def draining() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="server_draining", retry_after=random.uniform(1, 4))


def engine_dead() -> ApiError:
    return ApiError(503, "The engine is not running.", code="engine_dead", retry_after=random.uniform(1, 4))


def engine_starting(wait: float) -> ApiError:
    """`wait`: seconds that the start should still take."""
    return ApiError(503, "The engine is starting. Try again later.", code="engine_starting", retry_after=wait)


def engine_failed() -> ApiError:
    return ApiError(500, "The engine could not finish this request.", code="engine_error")


def aborted() -> ApiError:
    """Of an answer that has no place for it."""
    return ApiError(409, "This request was aborted before it had its answer.", code="request_aborted")


def out_of_time(reason: str, limit: str, tokens: int) -> ApiError:
    """The engine ended the request. `reason` is Chunk.error, `limit` names what ran out and its value."""
    says, code = _OUT_OF_TIME[reason]
    state = f"It was running, {tokens} tokens drawn" if tokens else "It was waiting, no token drawn"
    return ApiError(504, f"{limit} {says}. {state}.", code=code)


_OUT_OF_TIME = {
    "timeout": ("has passed", "request_timeout"),
    "deadline": ("has passed", "deadline_exceeded"),
    "unreachable": ("cannot be met any more, so the work was not begun", "deadline_unreachable"),
}


def internal() -> ApiError:
    return ApiError(500, "Internal server error.", code="internal_error")


def from_status(status: int) -> ApiError:
    """What the router itself refuses: no such path, no such method."""
    message, code = _ROUTER.get(status, ("The request was refused.", "http_error"))
    return ApiError(status, message, code=code)


_ROUTER = {
    404: ("There is nothing at this path.", "not_found"),
    405: ("This path does not take this method.", "method_not_allowed"),
}


def from_engine(error: Exception) -> ApiError:
    """The engine side's own errors, in HTTP's words; anything unexpected becomes a 500 that says nothing."""
    if isinstance(error, TooLongError):
        return ApiError(400, str(error), code="context_length_exceeded", param=error.param)
    if isinstance(error, RequestError):
        return invalid(str(error), error.param)
    if isinstance(error, EngineDeadError):
        return engine_dead()
    return internal()


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """pydantic's first error as one sentence with the field, what it must be, and what it was."""
    if not errors:
        return invalid("The request is not valid.")
    error = errors[0]
    where: list[str] = []
    value = body
    for part in error["loc"][1:]:  # the first part says "body"; the branches of a union are not the caller's names
        named = isinstance(value, dict) and part in value
        numbered = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if not named and not numbered:
            break
        value = value[part]
        where.append(str(part))
    if error["type"] == "missing":
        where.append(str(error["loc"][-1]))
        param = ".".join(where)
        return ApiError(400, f"`{param}` is required.", code="missing_parameter", param=param)
    param = ".".join(where)
    what = str(error["msg"])
    if not param:
        return invalid("The request body must be a JSON object.")
    if error["type"] == "too_long":
        most = error["ctx"]["max_length"]
        return invalid(f"`{param}` has {len(value)} entries; at most {most} are taken: send fewer.", param)
    return invalid(f"`{param}`: {what}; got {shown(value)}.", param)


def _whole_seconds(seconds: float) -> int:
    """For Retry-After. Jittered upwards, so that those who were turned away together do not come back together."""
    least = min(max(seconds, 1.0), MAX_RETRY_SECONDS)
    return min(math.ceil(least + random.uniform(0, max(1.0, least / 10))), MAX_RETRY_SECONDS)


def shown(value: Any) -> str:
    """A caller's value, short enough to be read and free of control characters."""
    try:
        text = value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()
    except RecursionError:  # encoding begins deeper in the stack than decoding did
        return "something nested deeply"
    text = "".join(c if c.isprintable() else "\ufffd" for c in text[: SHOWN_CHARS + 1])
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"
