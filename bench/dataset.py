"""What the load generator asks: lengths, and prompts that have them.

Random prompts draw ids from a pool that the served model's own tokenizer made of ordinary English, so they are valid
for any model without loading its tokenizer here. Everything is a function of the seed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..scheduler.traces import SHAREGPT, draw_lengths

POOL_TEXT = (
    "The morning ferry leaves the harbour before sunrise, carrying bread, letters and a few sleepy passengers. "
    "Engineers measure how quickly water moves through a narrow pipe, then compare the result with what theory says. "
    "She asked whether the library would stay open during winter; nobody at the desk could answer with certainty. "
    "A small program reads numbers from a file, sorts them, removes duplicates and prints the largest seven. "
    "Between mountains and sea there is a road that farmers built by hand, stone after stone, over thirty years. "
    "When prices rise faster than wages, households buy less, shops close early and towns slowly change their shape. "
    "Remember to close the valve, check both gauges, and write the pressure in the notebook before you leave. "
    "History rarely repeats exactly, but similar causes under similar conditions often bring similar effects."
)


@dataclass(frozen=True, slots=True)
class Shape:
    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. Exactly one of token_ids, text and messages is set; output_len None = as long as `answer` is.
    fields: what its body has beside those of all requests."""

    token_ids: tuple[int, ...] | None = None
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    output_len: int | None = None
    answer: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def random_shapes(count: int, input_len: int, output_len: int, range_ratio: float, seed: int) -> list[Shape]:
    """Lengths uniform in [len * (1 - ratio), len * (1 + ratio)], at least 1."""
    if input_len < 1 or output_len < 1 or not 0 <= range_ratio < 1:
        raise ValueError(
            f"--random-input-len {input_len} and --random-output-len {output_len} must be at least 1, "
            f"--random-range-ratio {range_ratio} in [0, 1)"
        )
    draw = random.Random(seed)

    def around(length: int) -> int:
        return max(1, draw.randint(math.floor(length * (1 - range_ratio)), math.ceil(length * (1 + range_ratio))))

    return [Shape(around(input_len), around(output_len)) for _ in range(count)]


def sharegpt_like_shapes(count: int, context: int, seed: int) -> list[Shape]:
    """Lengths of the openchat_sharegpt4 trace, scaled down where the model's context is shorter than it."""
    return [Shape(*lengths) for lengths in draw_lengths(SHAREGPT, count, seed, context)]


def token_asks(shapes: Sequence[Shape], pool: Sequence[int], seed: int, prefix_len: int = 0) -> list[Ask]:
    """Prompts of random ids: a prefix that all share (0 = none), then prompt_len ids of their own."""
    draw = random.Random(seed)
    prefix = tuple(draw.choices(pool, k=prefix_len))
    return [
        Ask(token_ids=prefix + tuple(draw.choices(pool, k=shape.prompt_len)), output_len=shape.output_len)
        for shape in shapes
    ]


def text_asks(shapes: Sequence[Shape], tokens_per_word: float, seed: int, prefix_len: int = 0) -> list[Ask]:
    """As `token_asks`, for endpoints that take text: random words near the wanted length (usage has the exact one)."""
    draw = random.Random(seed)
    words = POOL_TEXT.split()

    def text(tokens: int) -> str:
        return " ".join(draw.choices(words, k=max(1, round(tokens / tokens_per_word))))

    prefix = text(prefix_len) + " " if prefix_len else ""
    return [Ask(text=prefix + text(shape.prompt_len), output_len=shape.output_len) for shape in shapes]


def read_asks(path: Path, count: int, output_len: int | None, seed: int) -> list[Ask]:
    """`count` rows of a file, drawn without replacement, and repeated only when the file is shorter than `count`.

    .jsonl rows: {"prompt": text or ids} or {"messages": [...]}, with an optional "max_tokens".
    .json: the ShareGPT list of {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]};
    the first turn asks, and the answer's length is the length asked for.
    `output_len` overrides every row. Raises ValueError naming file, row and remedy.
    """
    try:
        content = path.read_text(encoding="utf-8")
        rows = json.loads(content) if path.suffix == ".json" else [json.loads(s) for s in content.splitlines() if s]
    except OSError as error:
        raise ValueError(f"--dataset {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--dataset {path}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"--dataset {path}: a .json file holds a list of conversations; use .jsonl for single rows")
    found = (ask_of(row, f"--dataset {path} row {number}") for number, row in enumerate(rows, 1))
    asks = [ask for ask in found if ask is not None]
    if not asks:
        raise ValueError(f"--dataset {path}: no usable rows")
    random.Random(seed).shuffle(asks)
    asks = [asks[i % len(asks)] for i in range(count)]
    if output_len is None:
        return asks
    return [replace(ask, output_len=output_len, answer=None) for ask in asks]


def ask_of(row: object, where: str) -> Ask | None:
    """What a row of a file asks; None for a conversation that cannot be used. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    limit = row.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{where}: max_tokens {limit!r} must be a whole number above 0")
    match row:
        case {"conversations": [{"value": str(question)}, {"value": str(answer)}, *_]}:
            return Ask(text=question, output_len=limit, answer=answer) if question and answer else None
        case {"conversations": _}:
            return None  # ShareGPT has conversations of a single turn: nothing to answer, or no answer to measure
        case {"messages": [*messages]} if messages:
            return Ask(messages=tuple(messages), output_len=limit)
        case {"prompt": str(text)} if text:
            return Ask(text=text, output_len=limit)
        case {"prompt": [*ids]} if ids and all(type(i) is int for i in ids):
            return Ask(token_ids=tuple(ids), output_len=limit)
    raise ValueError(f"{where}: needs a non-empty prompt (text or token ids), messages or conversations")
