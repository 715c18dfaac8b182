"""What counts as goodput under overload, and what as a refusal."""

from __future__ import annotations

import math

import pytest

from quire.bench.metrics import Record
from quire.bench.overload import Answered, OverloadConfig, _trial

CONFIG = OverloadConfig(seconds=10.0)  # counted from second 2 to second 10


def served(chunk_times: list[float], tokens: int, error: str | None = None) -> Answered:
    record = Record(sent=0.0, chunk_times=chunk_times, last=99.0, output_tokens=tokens, error=error)
    return Answered(record, 99.0)


def refused(kind: str, seconds: float) -> Answered:
    return Answered(Record(error=kind), seconds)


def test_tokens_count_within_the_window_and_of_requests_that_succeeded() -> None:
    answers = [
        served([1.0, 3.0, 9.0, 11.0], 8),  # two of its four events, two tokens in each
        served([5.0], 100, error="timeout"),
        refused("HTTP 503", 0.01),
        refused("HTTP 429", 0.03),
        refused("HTTP 500", 0.5),
    ]
    trial = _trial(10.0, 5.0, answers, 0.0, CONFIG)
    assert trial.tokens_per_second == pytest.approx(4 / 8)
    assert (trial.requests, trial.completed, trial.refused) == (5, 1, 2)
    assert trial.errors == {"timeout": 1, "HTTP 500": 1}
    assert trial.refused_p50 == pytest.approx(0.02)
    assert trial.ttft_p99 == 1.0


def test_nothing_is_told_as_nothing() -> None:
    trial = _trial(None, 0.0, [], 0.0, CONFIG)
    assert trial.tokens_per_second == 0
    assert math.isnan(trial.refused_p99)
    assert math.isnan(trial.ttft_p99)


@pytest.mark.parametrize("settings", [{"factors": ()}, {"factors": (0.0,)}, {"seconds": 0.0}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        OverloadConfig(**settings)  # type: ignore[arg-type]
