"""What counts as goodput under overload, and what as a refusal."""

from __future__ import annotations

import asyncio
import math

import pytest

from quire.bench.metrics import Record
from quire.bench.overload import Answered, OverloadConfig, Trial, _trial, run, summary

from .scripted_server import Script, serving

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


def test_shares_are_of_the_same_round_and_told_by_their_median() -> None:
    def trial(factor: float | None, tokens_per_second: float, errors: dict[str, int]) -> Trial:
        return Trial(factor, 1.0, 10, 6, 3, errors, tokens_per_second, 0.5, 0.01, 0.02)

    paces = [(1000.0, 900.0), (500.0, 490.0), (2000.0, 2100.0)]  # the machine's, and at ten times the load
    rows = summary([[trial(None, peak, {}), trial(10.0, at_ten, {"timeout": 1})] for peak, at_ten in paces])
    assert [row["factor"] for row in rows] == [None, 10.0]
    assert [row["share_of_peak"] for row in rows] == pytest.approx([1.0, 0.98])
    assert rows[1]["tokens_per_second"] == 900.0
    assert rows[1]["requests"] == 30
    assert rows[1]["errors"] == {"timeout": 3}
    assert rows[0]["errors"] == {}


@pytest.mark.parametrize("settings", [{"factors": ()}, {"factors": (0.0,)}, {"seconds": 0.0}, {"rounds": 0}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        OverloadConfig(**settings)  # type: ignore[arg-type]


async def test_no_prompt_comes_twice_however_long_the_closed_loop_runs() -> None:
    """One that did would find its blocks in the cache, and the peak would be of less work than the overload is."""
    script = Script()
    async with serving(script) as url:
        config = OverloadConfig(url=url, factors=(2.0,), rounds=2, seconds=0.5, input_len=32, output_len=2)
        trials = await asyncio.to_thread(run, config)
    prompts = [tuple(body["prompt"]) for body in script.bodies]
    assert trials["trials"][0]["requests"] > 2 * 4 * config.concurrency
    assert len(set(prompts)) == len(prompts)
