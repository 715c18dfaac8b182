"""Quire serves language models: `quire.LLM` in this process, `quire serve` over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.llm import LLM as LLM
    from .engine.llm import RequestOutput as RequestOutput
    from .scheduler.params import SamplingParams as SamplingParams
    from .scheduler.params import Slo as Slo
    from .scheduler.params import Speculative as Speculative

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "Slo", "Speculative", "__version__"]

_HOMES = {
    "LLM": "engine.llm",
    "RequestOutput": "engine.llm",
    "SamplingParams": "scheduler.params",
    "Slo": "scheduler.params",
    "Speculative": "scheduler.params",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: the command line's help must not wait for the engine's libraries."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
