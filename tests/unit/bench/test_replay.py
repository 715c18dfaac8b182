"""Traces of others as requests to a server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.bench.scripted_server import Script, serving

from quire.bench.dataset import Ask
from quire.bench.replay import Pool, asks_of, fitting, scaled
from quire.bench.report import as_json, load_text
from quire.bench.serve import LoadConfig, run
from quire.bench.trace_files import Trace, Traced, read_trace_file
from quire.scheduler.traces import TraceError

MOONCAKE = [
    {"timestamp": 1000, "input_length": 1200, "output_length": 20, "hash_ids": [7, 8, 9]},
    {"timestamp": 1500, "input_length": 1100, "output_length": 10, "hash_ids": [7, 8, 10]},
    {"timestamp": 3000, "input_length": 30, "output_length": 5, "hash_ids": [11]},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,374,44
2023-11-16 18:17:04.0799600,396,109
2023-11-16 18:17:06.9799600,879,55
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,API log
118,ChatGPT,417,276,693,Conversation log
"""


def written(tmp_path: Path, content: str | list[dict[str, Any]]) -> Path:
    path = tmp_path / "trace"
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
    return path


def shapes(trace: Trace) -> list[tuple[float, int, int]]:
    return [(round(row.time, 6), row.prompt_len, row.output_len) for row in trace.requests]


def test_mooncake_counts_milliseconds_and_names_blocks(tmp_path: Path) -> None:
    trace = read_trace_file(written(tmp_path, MOONCAKE))
    assert shapes(trace) == [(0.0, 1200, 20), (0.5, 1100, 10), (2.0, 30, 5)]
    assert trace.requests[1].blocks == (7, 8, 10)
    assert trace.left_out == {}


def test_azure_has_dates_with_seven_digits(tmp_path: Path) -> None:
    assert shapes(read_trace_file(written(tmp_path, AZURE))) == [(0.0, 374, 44), (0.1, 396, 109), (3.0, 879, 55)]


def test_azure_of_2024_has_a_time_zone(tmp_path: Path) -> None:
    header = AZURE.splitlines()[0]
    rows = "2024-05-10 00:00:01.5+00:00,2,1\n2024-05-10 00:00:00.009930+00:00,1,1\n"
    trace = read_trace_file(written(tmp_path, f"{header}\n{rows}"))
    assert shapes(trace) == [(0.0, 1, 1), (1.49007, 2, 1)]


def test_burstgpts_failures_are_left_out_and_counted(tmp_path: Path) -> None:
    trace = read_trace_file(written(tmp_path, BURST))
    assert shapes(trace) == [(0.0, 472, 18), (113.0, 417, 276)]
    assert trace.left_out == {"without an answer in the trace": 1}


def test_our_own_with_lengths_or_with_what_was_asked(tmp_path: Path) -> None:
    lengths = [{"time": 2, "prompt_len": 8, "output_len": 2, "tenant": "a", "session": 3, "priority": 1}]
    (row,) = read_trace_file(written(tmp_path, lengths)).requests
    assert row == Traced(0.0, 8, 2, session=3, fields={"tenant": "a", "priority": 1})
    asked = [
        {"time": 0, "prompt": "def f(", "max_tokens": 4},
        {"time": 1, "prompt": [1, 2], "max_tokens": 4, "tenant": "b"},
        {"time": 2, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    ]
    first, second, third = read_trace_file(written(tmp_path, asked)).requests
    assert first.ask == Ask(text="def f(", output_len=4)
    assert (second.ask, second.fields) == (Ask(token_ids=(1, 2), output_len=4), {"tenant": "b"})
    assert third.ask is not None
    assert third.ask.messages == ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "has the columns a, b"),
        ("[1]\n", "has the columns"),
        ('{"time": 1}\n', "line 1"),
        ('{"time": 1, "prompt": "x"}\n', '"max_tokens" is missing'),
        ('{"prompt": "x", "max_tokens": 1}\n', '"time" is None'),
        ('{"timestamp": 1, "input_length": 3}\n', '"output_length" is None'),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}\n', "at least 1"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}\n', '"hash_ids"'),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"a\n', "line 2 is not JSON"),
        ('{"time": 1, "prompt_len": 3, "output_len": 1, "colour": 3}\n', "colour"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2"),
        ("Timestamp,Request tokens,Response tokens\n1,many,1\n", "line 2"),
        ("Timestamp,Request tokens,Response tokens\n1,5\n", "line 2"),
        ("Timestamp,Request tokens,Response tokens\n1,5,0\n", "no request that was answered"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_line(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(TraceError, match=r"--trace|^trace") as error:
        read_trace_file(written(tmp_path, content))
    assert says in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="absent"):
        read_trace_file(tmp_path / "absent")


POOL = Pool(range(100, 400))


def ids(ask: Ask) -> tuple[int, ...]:
    assert ask.token_ids is not None
    return ask.token_ids


def test_equal_blocks_are_equal_tokens_and_nothing_else_is(tmp_path: Path) -> None:
    first, second, third = map(ids, asks_of(read_trace_file(written(tmp_path, MOONCAKE)), POOL, 0, 1.0))
    assert (len(first), len(second), len(third)) == (1200, 1100, 30)
    assert first[:1024] == second[:1024]
    assert first[1024:1100] != second[1024:]
    assert first[:30] != third


def test_shorter_prompts_share_as_much_as_long_ones(tmp_path: Path) -> None:
    trace = scaled(read_trace_file(written(tmp_path, MOONCAKE)), 1.0, 0.1, None)
    first, second, _ = map(ids, asks_of(trace, POOL, 0, 0.1))
    assert (len(first), len(second)) == (120, 110)
    assert first[:102] == second[:102]
    assert first[:110] != second


def test_turns_of_a_session_are_beginnings_of_each_other() -> None:
    rows = [Traced(0.0, 10, 1, session=1), Traced(1.0, 25, 1, session=1), Traced(2.0, 25, 1, session=2)]
    first, second, other = map(ids, asks_of(Trace(rows, {}), POOL, 0, 1.0))
    assert second[:10] == first
    assert other != second


def test_the_seed_decides_the_prompts(tmp_path: Path) -> None:
    trace = read_trace_file(written(tmp_path, AZURE))
    assert asks_of(trace, POOL, 1, 1.0) == asks_of(trace, POOL, 1, 1.0)
    assert asks_of(trace, POOL, 1, 1.0) != asks_of(trace, POOL, 2, 1.0)


def test_what_does_not_fit_is_refused_with_the_scale_that_would_do(tmp_path: Path) -> None:
    trace = read_trace_file(written(tmp_path, MOONCAKE))
    with pytest.raises(ValueError, match=r"2 of 3 requests do not fit .* 512 tokens, the longest has 1220") as error:
        fitting(trace, 512, "refuse", 1.0)
    factor = float(str(error.value).rpartition(" ")[2])
    fitting(scaled(trace, 1.0, factor, None), 512, "refuse", factor)
    kept = fitting(trace, 512, "skip", 1.0)
    assert shapes(kept) == [(2.0, 30, 5)]
    assert kept.left_out == {"longer than the context": 2}
    with pytest.raises(ValueError, match="no request fits"):
        fitting(trace, 16, "skip", 1.0)


async def replayed(script: Script, **settings: Any) -> Any:
    async with serving(script) as url:
        return await run(LoadConfig(base_url=url, **settings))


async def test_requests_leave_when_the_trace_says(tmp_path: Path) -> None:
    rows = [{"time": at, "prompt_len": 5 + i, "output_len": 2} for i, at in enumerate((10.0, 10.1, 10.1, 10.5))]
    script = Script()
    result = await replayed(script, trace=str(written(tmp_path, rows)), time_scale=0.5)
    start = result.records[0].due
    assert [round(record.due - start, 6) for record in result.records] == [0.0, 0.05, 0.05, 0.25]
    assert all(record.sent >= record.due for record in result.records)
    assert [record.prompt_tokens for record in result.records] == [5, 6, 7, 8]
    assert all(body["ignore_eos"] for body in script.bodies)
    assert load_text(result.config) == "trace at 2 x its speed"


async def test_what_was_asked_is_asked_again_with_its_fields(tmp_path: Path) -> None:
    rows = [{"time": i, "prompt": f"number {i}", "max_tokens": 2, "tenant": "t"} for i in range(3)]
    script = Script()
    await replayed(script, trace=str(written(tmp_path, rows)), time_scale=1e-3, num_prompts=2)
    _, *asked = script.bodies  # the first is the warm-up
    assert [(body["prompt"], body["tenant"]) for body in asked] == [("number 0", "t"), ("number 1", "t")]
    assert "ignore_eos" not in asked[0]


async def test_a_trace_of_lengths_by_chat(tmp_path: Path) -> None:
    script = Script()
    settings = {"trace": str(written(tmp_path, AZURE)), "time_scale": 1e-3, "length_scale": 0.1}
    result = await replayed(script, **settings, endpoint="/v1/chat/completions")
    assert [record.prompt_tokens for record in result.records] == [37, 40, 88]


async def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    rows = [*MOONCAKE[2:], *MOONCAKE[:1]]
    result = await replayed(Script(), trace=str(written(tmp_path, rows)), time_scale=1e-3, too_long="skip")
    assert as_json(result)["left_out"] == {"longer than the context": 1}
    assert result.summary.completed == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trace": "x", "request_rate": 1.0}, "--request-rate 1.0 and --trace x exclude each other"),
        ({"trace": "x", "dataset": "sharegpt-like"}, "--dataset"),
        ({"trace": "x", "random_input_len": 3}, "--random-input-len"),
        ({"time_scale": 2.0}, "needs a --trace"),
        ({"too_long": "skip"}, "needs a --trace"),
        ({"trace": "x", "time_scale": 0.0}, "--time-scale 0.0: must be a number above 0"),
        ({"trace": "x", "length_scale": float("nan")}, "--length-scale"),
        ({"trace": "x", "too_long": "cut"}, "choose refuse or skip"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="--") as error:
        replace(LoadConfig(), **settings)
    assert says in str(error.value)
