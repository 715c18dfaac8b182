"""What a server had in hand while it was under load: its /metrics, looked at twice a second.

A look costs the server a few milliseconds, so nobody looks who draws no report.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

LOOK_SECONDS = 0.5

# Our name of a column -> what servers call it. Counters are without their `_total`.
FAMILIES = {
    "running": ("quire_num_requests_running", "vllm:num_requests_running"),
    "waiting": ("quire_num_requests_waiting", "vllm:num_requests_waiting"),
    "kv_usage": ("quire_kv_cache_usage_perc", "vllm:kv_cache_usage_perc"),
    "prompt_tokens": ("quire_engine_prompt_tokens", "vllm:prompt_tokens"),
    "cached_tokens": ("quire_prefix_cache_hits", "vllm:prefix_cache_hits"),
    "drawn_tokens": ("quire_engine_generated_tokens", "vllm:generation_tokens"),
    "wasted_tokens": ("quire_spec_decode_num_wasted_tokens",),
    "useful_tokens": ("quire_step_tokens_useful",),
    "launched_tokens": ("quire_step_tokens_launched",),
    "steps": ("quire_engine_steps",),
}

Look = dict[str, float]  # "seconds" and those of FAMILIES that the server has, summed over labels


def read_look(exposition: str, seconds: float) -> Look:
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        if family.type in ("gauge", "counter"):
            suffix = "_total" if family.type == "counter" else ""
            values[family.name] = sum(s.value for s in family.samples if s.name == family.name + suffix)
    found = {name: next((values[n] for n in names if n in values), None) for name, names in FAMILIES.items()}
    return {"seconds": seconds, **{name: value for name, value in found.items() if value is not None}}


async def watch(metrics: Callable[[], Awaitable[str | None]], looks: list[Look]) -> None:
    """Look until cancelled, and add what is seen to `looks`; nothing where the server shows nothing."""
    start = time.perf_counter()
    while (text := await metrics()) is not None:
        looks.append(read_look(text, time.perf_counter() - start))
        await asyncio.sleep(LOOK_SECONDS)


def rates(looks: list[Look], name: str) -> list[float]:
    """Of a counter: how much a second it grew between each look and the next; empty where it is not told."""
    if any(name not in look for look in looks):
        return []
    return [
        max(0.0, after[name] - before[name]) / (after["seconds"] - before["seconds"])
        for before, after in pairwise(looks)
    ]
