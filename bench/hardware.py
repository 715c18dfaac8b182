"""A profile: how long the steps of one model on one machine take, and how much memory its KV cache has.

Profiles of machines that are not at hand are derived in `profiles/`, with the source of every number. `quire bench
idealized --json` writes the profile of a live engine.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scheduler.step_time import StepCost, StepShape

PROFILES = Path(__file__).parent / "profiles"

# The step that latency objectives are multiples of (Sarathi-Serve, arXiv 2403.02310): 32 streams with 4k of context.
REFERENCE_STEP = StepShape(num_tokens=32, decode_context=32 * 4096)

_LEAST = {"num_blocks": 2, "block_size": 1, "max_num_seqs": 1, "max_model_len": 2}


@dataclass(frozen=True, slots=True)
class Profile:
    """cost in seconds; max_model_len and block_size in tokens."""

    name: str
    cost: StepCost
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int

    @property
    def reference_seconds(self) -> float:
        """Of a pure decode step of 32 streams with 4k of context each."""
        return self.cost.seconds(REFERENCE_STEP)


def read_profile(name: str) -> Profile:
    """By the name of one of ours, or the path of a JSON file. Raises ValueError that names file, field and remedy."""
    path = PROFILES / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.json")))
        raise ValueError(f"--profile {name}: neither a file nor one of {known}") from error
    except ValueError as error:
        raise ValueError(f"--profile {name}: not valid JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("cost"), dict):
        raise ValueError(
            f'--profile {name}: needs {{"cost": {{…}}, "num_blocks": …}}, as `bench idealized --json` writes'
        )
    cost = {field: _number(data["cost"], field, name, 1 if field == "tile" else 0) for field in StepCost._fields}
    if not cost["base"] + cost["per_tile"] > 0:
        raise ValueError(f"--profile {name}: base and per_tile are 0, so that steps take no time; give one of them")
    limits = {field: int(_number(data, field, name, least)) for field, least in _LEAST.items()}
    return Profile(path.stem, StepCost(**cost | {"tile": int(cost["tile"])}), **limits)  # type: ignore[arg-type]


def _number(data: dict[str, Any], field: str, name: str, least: float) -> float:
    value = data.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ValueError(f"--profile {name}: {field} is {value!r}; give a number of at least {least}")
    return value
