"""Grafana's board of Quire, as data: rows of panels, each a question to Prometheus.

Writes grafana/dashboards/quire.json:

python -m quire.deploy.compose.board --write
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .panels import (
    WINDOW,
    Json,
    alerts,
    chosen,
    datasource,
    highest,
    lines,
    mean,
    panel,
    percentiles,
    placed,
    quantile,
    rate,
    servers,
    share,
    stat,
    total,
)

BOARD = Path(__file__).with_name("grafana") / "dashboards" / "quire.json"
OURS = 'job=~".*quire.*"'  # other programs have metrics of these names too

ROWS: dict[str, list[Json]] = {
    "Now": [
        stat(
            "Servers that serve",
            "Whose engine is up and moves.",
            "none",
            total("quire_engine_state", where='state="serving"'),
        ),
        stat(
            "Alerts that fire",
            "Of alerts.yml; each names its remedy.",
            "none",
            'count(ALERTS{alertname=~"Quire.*", alertstate="firing"}) or vector(0)',
        ),
        stat("Running", "Samples in the engines' batches.", "none", total("quire_num_requests_running")),
        stat("Waiting", "Samples that wait for a place there.", "none", total("quire_num_requests_waiting")),
        stat(
            "Longest predicted wait",
            "Of a request that came now, at the server where it is longest.",
            "s",
            highest("quire_queue_seconds_predicted"),
        ),
        stat(
            "KV cache in use",
            "Held by requests, at the server that is fullest.",
            "percentunit",
            highest("quire_kv_cache_usage_perc"),
        ),
        stat(
            "First token, p95",
            "Of samples that began lately.",
            "s",
            quantile(0.95, "quire_time_to_first_token_seconds"),
        ),
        stat(
            "Between tokens, p95",
            "Of tokens delivered lately.",
            "s",
            quantile(0.95, "quire_inter_token_latency_seconds"),
        ),
    ],
    "Requests": [
        lines(
            "Samples by end",
            "How they ended: by themselves, because the client left, or out of time.",
            "reqps",
            {
                "{{finished_reason}}": rate("quire_request_success_total", "finished_reason"),
                "client left, {{stage}}": rate("quire_requests_aborted_total", "stage"),
                "out of time: {{reason}}": rate("quire_requests_expired_total", "reason"),
            },
            stacked=True,
        ),
        lines(
            "Answers by status",
            "HTTP, probes and metrics left out.",
            "reqps",
            {"{{status}}": rate("quire_http_requests_total", "status", where='handler=~"/v1/.*|other"')},
            stacked=True,
        ),
        lines(
            "Refusals and errors by reason",
            "Not let in by quota or admission; and every error that was answered, by its code.",
            "reqps",
            {
                "not let in: {{reason}}": rate("quire_admission_rejections_total", "reason"),
                "{{code}} {{reason}}": rate("quire_request_errors_total", "code", "reason"),
            },
        ),
    ],
    "Latency": [
        lines(
            "To the first token",
            "From arrival at the server.",
            "s",
            percentiles("quire_time_to_first_token_seconds"),
            width=6,
        ),
        lines(
            "Between tokens",
            "Between two deliveries of one sample.",
            "s",
            percentiles("quire_inter_token_latency_seconds"),
            width=6,
        ),
        lines(
            "Whole samples", "From arrival to the end.", "s", percentiles("quire_e2e_request_latency_seconds"), width=6
        ),
        lines(
            "In the queue",
            "From arrival at the engine to the first step.",
            "s",
            percentiles("quire_request_queue_time_seconds"),
            width=6,
        ),
        panel(
            "heatmap",
            "Gaps between tokens",
            "How many were how long: two bands are two kinds of step.",
            "s",
            {"": f"sum by (le) (increase({chosen('quire_inter_token_latency_seconds_bucket')}[{WINDOW}]))"},
            width=12,
        ),
        lines(
            "Promises kept",
            "Of samples that were promised a first token, gaps or a deadline.",
            "percentunit",
            {"{{slo}}": share("quire_slo_total", "quire_slo_total", "slo", where='met="true"')},
            width=6,
        ),
        lines(
            "Distance from a server of one's own",
            "A sample's time over that of the same one alone in the engine: what company costs.",
            "none",
            percentiles("quire_contention_factor"),
            width=6,
        ),
    ],
    "Queue and steps": [
        lines(
            "Running and waiting",
            "Samples.",
            "none",
            {"running": total("quire_num_requests_running"), "waiting": total("quire_num_requests_waiting")},
        ),
        lines(
            "The wait",
            "As predicted for a request that came then, where it is longest, and as it was for one in twenty.",
            "s",
            {
                "predicted": highest("quire_queue_seconds_predicted"),
                "seen, p95": quantile(0.95, "quire_request_queue_time_seconds"),
            },
        ),
        lines(
            "Time of the engine",
            "Seconds in steps for each second: 1 = an engine that is never idle.",
            "none",
            {
                "{{part}}": rate("quire_step_seconds_total", "part"),
                "predicted": rate("quire_step_seconds_predicted_total"),
            },
        ),
        lines(
            "Steps",
            "A second; and tokens in one.",
            "none",
            {"steps/s": rate("quire_engine_steps_total"), "tokens in a step": mean("quire_iteration_tokens_total")},
        ),
        lines(
            "Use of the batch",
            "Tokens of steps over the same filled up to whole tiles; and how wrong the predicted step times are.",
            "percentunit",
            {
                "useful rows": share("quire_step_tokens_useful_total", "quire_step_tokens_launched_total"),
                "error of predicted steps": highest("quire_step_time_error_ratio"),
            },
        ),
        lines(
            "Preemption",
            "Running samples put back to waiting, and what it costs to compute them again.",
            "none",
            {
                "preemptions/s": rate("quire_num_preemptions_total"),
                "tokens computed again/s": rate("quire_recomputed_tokens_total"),
            },
        ),
    ],
    "Tokens": [
        lines(
            "Tokens a second",
            "Prompts computed, prompts found in the cache, and tokens drawn.",
            "none",
            {
                "prompt, computed": rate("quire_engine_prompt_tokens_total"),
                "prompt, from the cache": rate("quire_prefix_cache_hits_total"),
                "generated": rate("quire_engine_generated_tokens_total"),
            },
            width=6,
        ),
        lines(
            "KV cache",
            "Held by requests, at each server; free blocks are the rest, cached prompts among them.",
            "percentunit",
            {"{{instance}}": highest("quire_kv_cache_usage_perc", "instance")},
            width=6,
        ),
        lines(
            "Prefix cache",
            "Prompt tokens that were found, of those looked up.",
            "percentunit",
            {"hits": share("quire_prefix_cache_hits_total", "quire_prefix_cache_queries_total")},
            width=6,
        ),
        lines(
            "Cached blocks",
            "Free blocks that a prompt could still hit, and those given to something else.",
            "none",
            {"cached": total("quire_kv_blocks_cached"), "evicted/s": rate("quire_evicted_blocks_total")},
            width=6,
        ),
    ],
    "Guessing ahead (where the server speculates)": [
        lines(
            "Drafted and accepted",
            "Tokens a second.",
            "none",
            {
                "drafted": rate("quire_spec_decode_num_draft_tokens_total"),
                "accepted": rate("quire_spec_decode_num_accepted_tokens_total"),
                "wasted": rate("quire_spec_decode_num_wasted_tokens_total"),
            },
            width=6,
        ),
        lines(
            "Accepted",
            "Of the tokens that were guessed.",
            "percentunit",
            {
                "accepted": share(
                    "quire_spec_decode_num_accepted_tokens_total", "quire_spec_decode_num_draft_tokens_total"
                )
            },
            width=6,
        ),
        lines(
            "Length",
            "Tokens of a verification, the model's own included; and the depth of guesses, 0 where none paid.",
            "none",
            {
                "tokens of a verification": "1 + "
                + share("quire_spec_decode_num_accepted_tokens_total", "quire_spec_decode_num_drafts_total"),
                "depth chosen": mean("quire_spec_decode_depth"),
            },
            width=6,
        ),
        panel(
            "bargauge",
            "Accepted by position",
            "Drafts whose token at this position was drawn, of those that had one; the last quarter of an hour.",
            "percentunit",
            {
                "{{position}}": share(
                    "quire_spec_decode_num_accepted_tokens_per_pos_total",
                    "quire_spec_decode_num_drafts_per_pos_total",
                    "position",
                    every="15m",
                )
            },
            width=6,
        ),
    ],
    "Tenants (where they have names)": [
        lines(
            "Tokens",
            "A second, prompts and answers.",
            "none",
            {"{{tenant}} {{kind}}": rate("quire_tenant_tokens_total", "tenant", "kind")},
        ),
        lines(
            "Requests",
            "That were let in and have ended.",
            "reqps",
            {"{{tenant}}": rate("quire_tenant_requests_total", "tenant")},
        ),
        lines(
            "Refusals",
            "By quota or admission.",
            "reqps",
            {"{{tenant}}: {{reason}}": rate("quire_tenant_refusals_total", "tenant", "reason")},
        ),
    ],
    "Engine and process": [
        lines(
            "Engines by state",
            "Servers in each.",
            "none",
            {"{{state}}": total("quire_engine_state", "state")},
            stacked=True,
        ),
        lines(
            "Last sign of life",
            "Of the engine's loop. Past --hang-timeout the server is not ready, past twice that the engine is killed.",
            "s",
            {"{{instance}}": highest("quire_engine_heartbeat_age_seconds", "instance")},
        ),
        lines(
            "Restarts and hangs",
            "Since the server started.",
            "none",
            {
                "restarts: {{reason}}": total("quire_engine_restarts_total", "reason"),
                "hangs": total("quire_engine_hung_total"),
                "answers without numbers": total("quire_engine_nan_logits_total"),
            },
        ),
        lines(
            "Event loop",
            "How late it is: what a probe on the main port waits.",
            "s",
            percentiles("quire_event_loop_lag_seconds"),
            width=6,
        ),
        lines(
            "Memory",
            "Of the engine by kind, and of the API process.",
            "bytes",
            {
                "{{kind}}": total("quire_memory_bytes", "kind"),
                "API process": total("process_resident_memory_bytes", where=OURS),
            },
            width=6,
            stacked=True,
        ),
        lines(
            "API process",
            "Processor seconds a second, and the share of file descriptors that are open.",
            "percentunit",
            {
                "{{instance}}: processor": rate("process_cpu_seconds_total", "instance", where=OURS),
                "{{instance}}: open files": f"{chosen('process_open_fds', OURS)} / {chosen('process_max_fds', OURS)}",
            },
            width=6,
        ),
        panel(
            "bargauge",
            "Start by phase",
            "Seconds of the first start.",
            "s",
            {"{{phase}}": highest("quire_startup_seconds", "phase")},
            width=6,
        ),
    ],
}


def board() -> Json:
    """The dashboard as Grafana reads it."""
    return {
        "uid": "quire",
        "title": "Quire",
        "description": "An engine that serves language models: its requests, its queue, its cache, its health.",
        "tags": ["quire", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one cross-hair for all panels
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [datasource(), servers()]},
        "annotations": {"list": [alerts()]},
        "panels": placed(ROWS),
    }


def text() -> str:
    return json.dumps(board(), indent=2) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        BOARD.write_text(text(), encoding="utf-8")
    print(f"{sum(len(panels) for panels in ROWS.values())} panels")
