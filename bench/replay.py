"""A trace as requests to a server: when each leaves, and a prompt for it. `quire bench serve --trace FILE`.

Made-up prompts are drawn from a pool of ids (or words), each part by a seed of its own: parts that the trace calls by
the same name are the same tokens, so that a prefix cache finds what it would have found, and nothing else.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from .dataset import Ask
from .trace_files import MOONCAKE_BLOCK, Trace, Traced

TOO_LONG = ("refuse", "skip")


@dataclass(frozen=True, slots=True)
class Pool:
    """What prompts are drawn from: ids, or words where an endpoint takes text; tokens: of one of them, on average."""

    items: Sequence[int] | Sequence[str]
    tokens: float = 1.0

    def ask(self, drawn: Sequence[int | str], output_len: int) -> Ask:
        if isinstance(self.items[0], str):
            return Ask(text=" ".join(map(str, drawn)), output_len=output_len)
        return Ask(token_ids=tuple(int(item) for item in drawn), output_len=output_len)


def scaled(trace: Trace, time_scale: float, length_scale: float, count: int | None) -> Trace:
    """The first `count` requests (None = all), in `time_scale` of their time and at `length_scale` of their length."""

    def length(tokens: int) -> int:
        return max(1, round(tokens * length_scale))

    kept = [
        replace(
            row,
            time=row.time * time_scale,
            prompt_len=length(row.prompt_len) if row.ask is None else 0,
            output_len=length(row.output_len) if row.ask is None else row.output_len,
        )
        for row in islice(trace.requests, count)
    ]
    return Trace(kept, trace.left_out)


def fitting(trace: Trace, context: int | None, too_long: str, length_scale: float) -> Trace:
    """Without what the server's context does not hold; ValueError for the first such request under "refuse"."""
    if context is None:
        return trace
    long = [row for row in trace.requests if row.prompt_len + row.output_len > context]
    if not long:
        return trace
    if too_long == "refuse":
        longest = max(row.prompt_len + row.output_len for row in long)
        raise ValueError(
            f"--trace: {len(long)} of {len(trace.requests)} requests do not fit the server's context of {context} "
            f"tokens, the longest has {longest}; pass --too-long skip, or --length-scale "
            f"{math.floor(1e4 * length_scale * context / longest) / 1e4:g}"
        )
    kept = [row for row in trace.requests if row.prompt_len + row.output_len <= context]
    if not kept:
        raise ValueError(f"--trace: no request fits the server's context of {context} tokens; lower --length-scale")
    return Trace(kept, {**trace.left_out, "longer than the context": len(long)})


def asks_of(trace: Trace, pool: Pool, seed: int, length_scale: float) -> list[Ask]:
    """What each request asks. seed: of the made-up prompts."""
    block = max(1, round(MOONCAKE_BLOCK * length_scale / pool.tokens))
    return [_ask(row, pool, seed, serial, block) for serial, row in enumerate(trace.requests)]


def _ask(row: Traced, pool: Pool, seed: int, serial: int, block: int) -> Ask:
    fields = dict(row.fields or {})
    if row.ask is not None:
        return replace(row.ask, fields=fields)
    if row.session >= 0:
        drawn = _endless(pool, f"{seed} session {row.session}")
    else:
        named = (islice(_endless(pool, f"{seed} block {name}"), block) for name in row.blocks)
        drawn = chain(chain.from_iterable(named), _endless(pool, f"{seed} request {serial}"))
    count = max(1, round(row.prompt_len / pool.tokens))
    return replace(pool.ask(list(islice(drawn, count)), row.output_len), fields=fields)


def _endless(pool: Pool, name: str) -> Iterator[int | str]:
    draw = random.Random(name)
    while True:
        yield draw.choice(pool.items)
