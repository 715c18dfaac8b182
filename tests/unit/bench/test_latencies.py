from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.metrics import Record, describe, is_good, parse_goodput, percentile, summarise

floats = st.floats(min_value=-1e6, max_value=1e6)


@given(st.lists(floats, min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-9, abs=1e-9)


@given(st.lists(floats, min_size=1, max_size=50))
def test_mean_and_deviation_are_numpys(values: list[float]) -> None:
    d = describe(values, (50,))
    assert d.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert d.std == pytest.approx(np.std(values), rel=1e-6, abs=1e-6)


def test_nothing_measured_is_nan_not_zero() -> None:
    assert math.isnan(percentile([], 50))
    assert math.isnan(describe([], (50,)).mean)


def record(
    sent: float = 10.0, chunks: tuple[float, ...] = (10.5, 10.6, 10.8), output: int = 5, **more: object
) -> Record:
    return Record(
        due=sent, sent=sent, chunk_times=list(chunks), last=11.0, prompt_tokens=7, output_tokens=output, **more
    )


def test_latencies_of_one_request() -> None:
    r = record()
    assert r.ttft == pytest.approx(0.5)
    assert r.e2el == pytest.approx(1.0)
    assert r.tpot == pytest.approx(0.5 / 4)  # from the first text to the end, over the four tokens after the first
    assert r.itls == pytest.approx([0.1, 0.2])


def test_a_single_token_has_no_tpot_and_a_silent_one_is_seen_at_the_end() -> None:
    assert record(output=1).tpot is None
    silent = record(chunks=(), output=1)
    assert silent.ttft == silent.e2el == pytest.approx(1.0)


def test_summary_counts_only_what_succeeded() -> None:
    failed = [record(error="HTTP 503"), record(error="HTTP 503"), record(error="timeout")]
    summary = summarise([record(), record(), *failed], duration=2.0)
    assert (summary.completed, summary.prompt_tokens, summary.output_tokens) == (2, 14, 10)
    assert summary.errors == {"HTTP 503": 2, "timeout": 1}
    assert summary.output_throughput == pytest.approx(5.0)
    assert summary.total_token_throughput == pytest.approx(12.0)
    assert summary.request_throughput == pytest.approx(1.0)
    assert summary.latencies["ttft"].count == 2
    assert summary.latencies["itl"].count == 4
    assert summary.latencies["e2el"].mean == pytest.approx(1000.0)
    assert summary.goodput is None


def test_lateness_is_the_worst_of_the_clients_own() -> None:
    late = record()
    late.due = 9.0
    assert summarise([record(), late], 1.0).max_lateness == pytest.approx(1.0)


def test_goodput_needs_every_limit_and_success() -> None:
    limits = parse_goodput(["ttft:600", "tpot:130", "e2el:1100"])
    assert limits == {"ttft": 0.6, "tpot": 0.13, "e2el": 1.1}
    assert is_good(record(), limits)
    for tight in ("ttft:400", "tpot:120", "e2el:900"):
        assert not is_good(record(), {**limits, **parse_goodput([tight])}), tight
    assert not is_good(record(error="timeout"), limits)
    assert summarise([record(), record(sent=8.0)], 2.0, limits).goodput == pytest.approx(0.5)


@pytest.mark.parametrize("bad", ["ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-5", "ttft:nan", "itl:5", ":5", ""])
def test_goodput_limits_that_mean_nothing_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="--goodput"):
        parse_goodput([bad])
