"""How busy this server is, for those who choose between several: `/load`, and ORCA's header on answers.

ORCA (Open Request Cost Aggregation): a caller that sends `endpoint-load-metrics-format: TEXT` or `JSON` gets the
figures with its answer, in the header `endpoint-load-metrics`.
"""

from __future__ import annotations

import msgspec

from ..engine.messages import StepStats

ASKED_BY = "endpoint-load-metrics-format"
ANSWERED_IN = "endpoint-load-metrics"


def load_of(stats: StepStats) -> dict[str, float]:
    """The engine's figures after its last step, under the names that endpoint pickers know."""
    return {
        "kv_cache_usage_perc": stats.kv_blocks_used / max(stats.kv_blocks_total, 1),
        "num_requests_running": stats.running,
        "num_requests_waiting": stats.waiting,
    }


def orca_headers(format: str, stats: StepStats) -> dict[str, str]:
    """The header in the format asked for; none where that is not one of ORCA's written ones."""
    load = load_of(stats)
    if format.upper() == "TEXT":
        return {ANSWERED_IN: "TEXT " + ", ".join(f"named_metrics.{name}={value:g}" for name, value in load.items())}
    if format.upper() == "JSON":
        return {ANSWERED_IN: "JSON " + msgspec.json.encode({"named_metrics": load}).decode()}
    return {}
