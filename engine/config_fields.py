"""Reading a model's JSON without trusting it: every value is fetched by type and range, or refused by name.

A file from a hub is input like any other. All refusals are `EngineStartError` and name file, key, value and remedy.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NoReturn

from .errors import EngineStartError

# Bounds that no released model approaches; they keep a broken file from becoming a huge allocation.
MAX_HIDDEN = 1 << 17
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 10
MAX_HEAD_DIM = 1 << 10
MAX_FFN = 1 << 20
MAX_VOCAB = 1 << 22
MAX_POSITION = 1 << 24
MAX_EXPERTS = 1 << 12
LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_JSON_BYTES = 64 << 20  # a sharded index of a large mixture of experts is 10 MB; nothing honest comes near this


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises EngineStartError for a missing, oversized or malformed file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise EngineStartError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; this is not a model's JSON file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineStartError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise EngineStartError(f"{path} is not valid JSON ({error}); download the model again") from None
    if not isinstance(value, dict):
        raise EngineStartError(f"{path} holds a JSON {type(value).__name__}, not an object; download the model again")
    return value


class ConfigFields:
    """Typed access to one JSON object. A key that is absent or null takes the default; no default means required."""

    def __init__(self, path: Path, values: dict[str, object], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self.prefix = prefix

    def refuse(self, key: str, remedy: str) -> NoReturn:
        value = repr(self.values.get(key))
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise EngineStartError(f"{self.path}: {self.prefix}{key} = {shown}: {remedy}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _get(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise EngineStartError(f"{self.path}: {self.prefix}{key} is missing; this model type cannot do without it")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(key, f"must be a whole number from {low} to {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        return self.integer(key, low, high) if self.has(key) else None

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in low .. high."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(key, f"must be a number from {low:g} to {high:g}")
        if not math.isfinite(value):
            self.refuse(key, "must be finite")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            self.refuse(key, "must be a string")
        return value

    def integers(self, key: str, low: int, high: int) -> list[int]:
        """A list of whole numbers, or one alone; empty when the key is absent."""
        value = self.values.get(key)
        if value is None:
            return []
        entries: list[int] = []
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, int) or isinstance(entry, bool) or not low <= entry <= high:
                self.refuse(key, f"must be whole numbers from {low} to {high}")
            entries.append(entry)
        return entries

    def numbers(self, key: str, length: int) -> list[float]:
        value = self._get(key, None)
        finite = isinstance(value, list) and all(
            isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x > 0 for x in value
        )
        if not finite or not isinstance(value, list) or len(value) != length:
            self.refuse(key, f"must be a list of {length} positive numbers")
        return [float(x) for x in value]

    def choices(self, key: str, allowed: tuple[str, ...], length: int) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, list) or len(value) != length or any(entry not in allowed for entry in value):
            self.refuse(key, f"must be a list of {length} entries, each one of {', '.join(allowed)}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty when the key is absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            self.refuse(key, "must be a list of strings")
        return value

    def child(self, key: str) -> ConfigFields:
        value = self._get(key, None)
        if not isinstance(value, dict):
            self.refuse(key, "must be an object")
        return ConfigFields(self.path, value, f"{self.prefix}{key}.")
