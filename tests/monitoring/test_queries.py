"""Every metric and label that the board and the alerts ask for is one that servers show."""

from __future__ import annotations

import re

import pytest
from monitoring.families import families, known_series
from monitoring.queries import Query, board_queries, kept_labels, rule_queries, selectors

PROMETHEUS_OWN = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate"}}
ANY_SERIES = {"instance", "job"}  # what Prometheus adds to all that it scrapes
# Told by others that are; or facts that do not change; or of one kind of machine.
NOT_ON_THE_BOARD = {
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
    "quire_cache_config_info",
    "quire_discarded_tokens_total",
    "quire_eager_steps_total",
    "quire_engine_aborted_total",
    "quire_engine_expired_total",
    "quire_engine_failed_total",
    "quire_engine_start_progress",
    "quire_generation_tokens_total",
    "quire_graph_steps_total",
    "quire_http_request_duration_seconds",
    "quire_prompt_tokens_cached_total",
    "quire_prompt_tokens_total",
    "quire_request_generation_tokens",
    "quire_request_prompt_tokens",
    "quire_request_time_per_output_token_seconds",
    "quire_spec_decode_acceptance_length",
    "quire_spec_decode_failures_total",
    "quire_spec_decode_seconds_total",
}
QUERIES = [*board_queries(), *rule_queries()]


def unknown(query: Query) -> list[str]:
    """What it asks for that nobody shows."""
    series = known_series()
    missing = []
    for one in selectors(query.text):
        if one.name in PROMETHEUS_OWN:
            allowed = PROMETHEUS_OWN[one.name]
        elif one.name in series:
            allowed = {*series[one.name].labels, *ANY_SERIES, *(["le"] if one.name.endswith("_bucket") else [])}
        else:
            missing.append(one.name)
            continue
        missing += [f"{one.name}: {label}" for label in sorted(one.labels - allowed)]
    return missing


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_what_is_asked_for_exists(query: Query) -> None:
    assert unknown(query) == []


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_what_a_legend_names_is_kept(query: Query) -> None:
    assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= kept_labels(query.text)


def test_what_is_not_on_the_board_is_left_out_on_purpose() -> None:
    asked = {one.name for query in board_queries() for one in selectors(query.text)}
    assert {family.name for family in families() if not asked & set(family.series)} == NOT_ON_THE_BOARD


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("rate(quire_sneezes_total[1m])", ["quire_sneezes_total"]),
        ("quire_request_success_total{colour='red'}", ["quire_request_success_total: colour"]),
        ("sum by (le) (rate(quire_slo_total[1m]))", ["quire_slo_total: le"]),
        ("sum by (tenant) (quire_engine_state)", ["quire_engine_state: tenant"]),
        ("up > on (slo) quire_slo_total", ["up: slo"]),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_found(text: str, wrong: list[str]) -> None:
    assert unknown(Query("here", "", text)) == wrong
