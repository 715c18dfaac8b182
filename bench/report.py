"""A load test's result, for eyes and for scripts (field names of `vllm bench serve`'s JSON)."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .. import __version__
from .metrics import LATENCIES, Distribution, Record, percentile
from .serve import NUM_PROMPTS, LoadConfig, Result

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}


def load_text(config: LoadConfig) -> str:
    cap = f", at most {config.concurrency} at once" if config.concurrency else ""
    if config.trace is not None:
        return f"trace at {1 / config.time_scale:g} x its speed{cap}"
    if config.request_rate is not None:
        return f"open loop, {config.request_rate:g} requests/s{cap}"
    return f"closed loop, {config.concurrency or config.num_prompts or NUM_PROMPTS} at once"


def counters_text(result: Result) -> Text:
    """Do the server's counters agree with what its answers said?"""
    client, server = result.client_tokens, result.server_tokens
    if server is None:
        return Text("the server shows no token counters at /metrics", style="yellow")
    if server == client:
        return Text(
            f"equal: {client.prompt_tokens} prompt and {client.generation_tokens} generation tokens", style="green"
        )
    return Text(
        f"differ: server {server.prompt_tokens} + {server.generation_tokens}, client {client.prompt_tokens} + "
        f"{client.generation_tokens} (prompt + generation; failed requests and other clients make a difference)",
        style="yellow",
    )


def table(result: Result) -> Group:
    summary, config = result.summary, result.config
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Model", result.model)
    facts.add_row("Load", f"{load_text(config)}; {config.trace or config.dataset} on {config.endpoint}")
    for why, count in result.left_out.items():
        facts.add_row("Left out", f"{count} requests of the trace: {why}")
    facts.add_row("Requests", f"{summary.completed} completed, {sum(summary.errors.values())} failed")
    facts.add_row("Duration", f"{summary.duration:.2f} s")
    facts.add_row("Tokens", f"{summary.prompt_tokens} in ({summary.cached_tokens} cached), {summary.output_tokens} out")
    facts.add_row("Request throughput", f"{summary.request_throughput:.2f} requests/s")
    facts.add_row("Output throughput", f"{summary.output_throughput:.1f} tokens/s")
    facts.add_row("Total throughput", f"{summary.total_token_throughput:.1f} tokens/s")
    if summary.goodput is not None:
        limits = " ".join(f"{name}:{1000 * limit:g}" for name, limit in config.goodput.items())
        facts.add_row("Goodput", f"{summary.goodput:.2f} requests/s within {limits} ms")
    if config.request_rate is not None or config.trace is not None:
        facts.add_row("Sent late by", f"at most {1000 * summary.max_lateness:.1f} ms")
    facts.add_row("Server's counters", counters_text(result))
    for kind, count in summary.errors.items():
        facts.add_row(Text("Failed", style="red"), Text(f"{count} × {kind}  {result.details[kind]}", style="red"))

    latencies = Table("ms", "mean", *(f"p{q:g}" for q in config.percentiles))
    for column in latencies.columns[1:]:
        column.justify = "right"
    for name in LATENCIES:
        d = summary.latencies[name]
        values = (d.mean, *d.percentiles.values())
        latencies.add_row(TITLES[name], *("-" if math.isnan(value) else f"{value:.2f}" for value in values))
    return Group(facts, latencies)


def as_json(result: Result) -> dict[str, Any]:
    summary, config = result.summary, result.config
    settings = asdict(config)
    del settings["api_key"]
    return {
        "benchmark": "serve",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quire_version": __version__,
        "client_machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "model_id": result.model,
        "settings": settings,
        "duration": summary.duration,
        "completed": summary.completed,
        "failed": sum(summary.errors.values()),
        "errors": summary.errors,
        "error_examples": result.details,
        "left_out": result.left_out,
        "total_input_tokens": summary.prompt_tokens,
        "total_output_tokens": summary.output_tokens,
        "total_cached_tokens": summary.cached_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.goodput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_lateness_ms": 1000 * summary.max_lateness,
        "client_tokens": asdict(result.client_tokens),
        "server_tokens": None if result.server_tokens is None else asdict(result.server_tokens),
        **{key: value for name in LATENCIES for key, value in _flat(name, summary.latencies[name]).items()},
        "itl_quantiles_ms": _quantiles(result.records),
        "requests": _columns(result.records),
        "looks": result.looks,
        "server": result.version,
    }


def _quantiles(records: Sequence[Record]) -> list[float]:
    """Of all gaps, at every half percent from 0 to 100: enough to draw them by. Empty where there are none."""
    gaps = sorted(1000 * gap for record in records if record.error is None for gap in record.itls)
    return [round(percentile(gaps, q / 2), 3) for q in range(201)] if gaps else []


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Every request, in the order in which they were asked; latencies of those that failed are null."""
    start = min(record.due for record in records)

    def ms(value: float | None, record: Record) -> float | None:
        return None if value is None or record.error is not None else round(1000 * value, 3)

    return {
        "due_s": [round(r.due - start, 4) for r in records],
        "sent_s": [round(r.sent - start, 4) for r in records],
        "ttft_ms": [ms(r.ttft, r) for r in records],
        "tpot_ms": [ms(r.tpot, r) for r in records],
        "e2el_ms": [ms(r.e2el, r) for r in records],
        "prompt_tokens": [r.prompt_tokens for r in records],
        "cached_tokens": [r.cached_tokens for r in records],
        "output_tokens": [r.output_tokens for r in records],
        "error": [r.error for r in records],
    }


def _flat(name: str, d: Distribution) -> dict[str, float | None]:
    values = {"mean": d.mean, "median": d.median, "std": d.std, **d.percentiles}
    # JSON has no NaN: a latency without samples is null.
    return {f"{point}_{name}_ms": None if math.isnan(value) else value for point, value in values.items()}
