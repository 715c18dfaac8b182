from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.traces import (
    ARXIV,
    LAWS,
    SHAREGPT,
    Arrival,
    LengthLaw,
    TraceError,
    arrival_times,
    at_rate,
    conversations,
    draw_lengths,
    merged,
    read_trace,
    synthetic,
    token_ids,
)


@pytest.mark.parametrize(
    ("law", "prompt", "output"), [(SHAREGPT, (1730, 5696), (415, 834)), (ARXIV, (7059, 12985), (208, 371))]
)
def test_lengths_have_the_published_medians_and_tails(
    law: LengthLaw, prompt: tuple[int, int], output: tuple[int, int]
) -> None:
    lengths = draw_lengths(law, 20_000, seed=3)
    for published, drawn in (
        (prompt, sorted(shape.prompt_len for shape in lengths)),
        (output, sorted(shape.output_len for shape in lengths)),
    ):
        assert statistics.median(drawn) == pytest.approx(published[0], rel=0.03)
        assert drawn[int(0.9 * len(drawn))] == pytest.approx(published[1], rel=0.03)


@given(st.sampled_from(sorted(LAWS)), st.integers(64, 40_000), st.integers(0, 99))
def test_lengths_fit_the_context(name: str, context: int, seed: int) -> None:
    law = LAWS[name]
    for shape in draw_lengths(law, 50, seed, context):
        assert shape.prompt_len + shape.output_len <= min(context, law.context)
        assert min(shape) >= 4


def test_everything_is_a_function_of_the_seed() -> None:
    assert draw_lengths(SHAREGPT, 50, 1) == draw_lengths(SHAREGPT, 50, 1) != draw_lengths(SHAREGPT, 50, 2)
    starts = [0.0, 1.0]
    one, other = (conversations(starts, SHAREGPT, turns=3, think=5, seed=seed) for seed in (1, 2))
    assert one == conversations(starts, SHAREGPT, turns=3, think=5, seed=1)
    assert one != other


def test_conversations_repeat_what_was_said() -> None:
    arrivals = conversations([0.0, 3.0, 5.0] * 20, SHAREGPT, turns=4.0, think=10.0, seed=0, tenant="chat")
    assert arrivals == sorted(arrivals)
    sessions: dict[int, list[Arrival]] = {}
    for arrival in arrivals:
        assert arrival.tenant == "chat"
        assert arrival.prompt_len + arrival.output_len <= SHAREGPT.context
        sessions.setdefault(arrival.session, []).append(arrival)
    for turns in sessions.values():
        assert [arrival.turn for arrival in turns] == list(range(len(turns)))
        for before, after in pairwise(turns):
            assert after.prompt_len > before.prompt_len + before.output_len
            assert after.time > before.time
    assert max(len(turns) for turns in sessions.values()) > 2


def test_turns_share_tokens_and_strangers_do_not() -> None:
    first, second = Arrival(0, 10, 5, session=3), Arrival(1, 20, 5, session=3, turn=1)
    assert token_ids(second, 7)[:10] == token_ids(first, 2)
    for stranger in (token_ids(Arrival(0, 10, 5), 6), token_ids(Arrival(0, 10, 5), 3)):
        assert not set(stranger) & set(token_ids(first, 2))
    assert token_ids(Arrival(0, 4, 5), 1) != token_ids(Arrival(0, 4, 5), 2)


def test_tenants_are_merged_in_order_and_rates_scale_time_only() -> None:
    slow = synthetic(arrival_times(20, 1.0, seed=1), draw_lengths(SHAREGPT, 20, 1), "slow")
    fast = synthetic(arrival_times(50, 5.0, seed=2), draw_lengths(ARXIV, 50, 1), "fast", priority=2)
    both = merged(slow, fast)
    assert [arrival.time for arrival in both] == sorted(arrival.time for arrival in both)
    assert sorted(both) == sorted([*slow, *fast])
    assert [a._replace(time=0) for a in at_rate(both, 4.0)] == [a._replace(time=0) for a in both]
    assert [a.time for a in at_rate(both, 4.0)] == [a.time / 4 for a in both]


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


GOOD = {"time": 1.5, "prompt_len": 7, "output_len": 3}


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    more = {"time": 2, "prompt_len": 9, "output_len": 1, "tenant": "b", "session": 4, "priority": -1}
    path = write(tmp_path / "t.jsonl", GOOD, "", more, more | {"prompt_len": 12})
    assert read_trace(path) == [
        Arrival(1.5, 7, 3),
        Arrival(2.0, 9, 1, "b", 4, 0, -1),
        Arrival(2.0, 12, 1, "b", 4, 1, -1),
    ]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", ["not JSON", "write"]),
        ("3", ["not an object", "write"]),
        ({"time": 2, "prompt_len": 3}, ['"output_len" is missing', "write"]),
        (GOOD | {"prompt_len": -1}, ['"prompt_len" is -1', "at least 1"]),
        (GOOD | {"output_len": 0}, ['"output_len" is 0', "at least 1"]),
        (GOOD | {"prompt_len": 2.5}, ['"prompt_len" is 2.5', "whole number"]),
        (GOOD | {"prompt_len": True}, ['"prompt_len" is True', "whole number"]),
        (GOOD | {"time": "now"}, ["\"time\" is 'now'", "seconds"]),
        (GOOD | {"time": math.nan}, ['"time" is nan', "seconds"]),
        (GOOD | {"time": -1}, ['"time" is -1', "at least 0"]),
        (GOOD | {"time": 1.0}, ['"time" is 1', "sort"]),
        (GOOD | {"tenant": 3}, ['"tenant" is 3', "a text"]),
        (GOOD | {"promt_len": 3}, ["promt_len", "leave it out"]),
    ],
)
def test_holes_are_named_with_file_line_field_and_remedy(tmp_path: Path, line: object, named: list[str]) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, line)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert f"{path} line 2" in str(caught.value)
    for text in named:
        assert text in str(caught.value)


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no requests"):
        read_trace(write(tmp_path / "t.jsonl", ""))
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "absent.jsonl")
