"""One line every ten seconds while there is work: what people watch when they watch a terminal."""

from __future__ import annotations

import asyncio

from ..engine.messages import StepStats
from .logs import logger
from .metrics import Metrics

INTERVAL = 10.0  # seconds; what other engines have taught people to expect


async def report_throughput(metrics: Metrics, interval: float = INTERVAL) -> None:
    """Runs until cancelled."""
    last = metrics.stats
    while True:
        await asyncio.sleep(interval)
        now = metrics.stats
        if now.steps_total != last.steps_total or now.waiting or now.running:
            logger.info("%s", throughput_line(last, now, interval))
        last = now


def throughput_line(last: StepStats, now: StepStats, seconds: float) -> str:
    prompt = (now.prompt_tokens_total - last.prompt_tokens_total) / seconds
    generated = (now.generated_tokens_total - last.generated_tokens_total) / seconds
    queries = now.prefix_query_tokens_total - last.prefix_query_tokens_total
    hits = now.prefix_hit_tokens_total - last.prefix_hit_tokens_total
    kv = 100 * now.kv_blocks_used / max(now.kv_blocks_total, 1)
    drafts = sum(now.drafted_by_position[:1]) - sum(last.drafted_by_position[:1])
    accepted = now.accepted_tokens_total - last.accepted_tokens_total
    speculation = f", acceptance length {1 + accepted / drafts:.2f}" if drafts else ""
    return (
        f"prompt {prompt:.1f} tok/s, generation {generated:.1f} tok/s, running {now.running}, waiting {now.waiting}, "
        f"preemptions {now.preemptions_total - last.preemptions_total}, KV cache {kv:.1f} %, "
        f"prefix hits {100 * hits / max(queries, 1):.1f} %{speculation}"
    )
