"""docs/metrics.md says what there is."""

from __future__ import annotations

import pytest
from monitoring import families, reference


def test_the_page_is_the_one_that_the_metrics_give() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), (
        "docs/metrics.md is stale: PYTHONPATH=tests python -m monitoring.reference --write"
    )


def test_a_metric_that_is_new_makes_the_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    new = families.Family("quire_engine_sneezes_total", "counter", (), (), "Times that it sneezed.", "", "")
    monkeypatch.setattr(reference, "families", lambda: (*families.families(), new))
    assert reference.page() != reference.PAGE.read_text(encoding="utf-8")


def test_a_metric_nobody_saw_a_sample_of_is_no_metric_of_which_the_labels_are_known() -> None:
    with pytest.raises(AssertionError, match="quire_sneezes"):
        families._read("# HELP quire_sneezes x\n# TYPE quire_sneezes gauge\n")


def test_what_only_some_servers_have_is_marked() -> None:
    known = families.known_series()
    assert known["quire_tenant_tokens_total"].needs == "named tenants"
    assert known["quire_spec_decode_num_drafts_total"].needs == "speculation"
    assert known["quire_slo_total"].extra_labels == ("tenant",)
    assert known["quire_request_success_total"].alias == "vllm:request_success_total"
    assert known["quire_time_to_first_token_seconds_bucket"].unit == "seconds"
