"""Everything that can go wrong on purpose, with the party that has to act.

QuireError
├── RequestError          the caller's request: one request ends, with a message that names field, value and remedy
│   └── TooLongError      prompt (and output) do not fit the context
└── EngineError
    ├── EngineStartError  bad folder, bad setting, not enough memory
    │   └── SettingError  seen before anything was loaded: what was asked for cannot be
    └── EngineDeadError   the engine process is gone
"""

from __future__ import annotations


class QuireError(Exception):
    pass


class RequestError(QuireError):
    """A request that cannot be served as asked. `param` is the field at fault, in the caller's spelling."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLongError(RequestError):
    pass


class EngineError(QuireError):
    pass


class EngineStartError(EngineError):
    pass


class SettingError(EngineStartError):
    pass


class EngineDeadError(EngineError):
    pass


class RankLost(BaseException):
    """A rank of tensor parallelism has ended, or does not do what the others do: none of them can go on.

    No `Exception`: a boundary that ends one request for its fault must not take this for one.
    """
