"""The load generator against a scripted server on a real port."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from unit.bench.scripted_server import PAUSE, Script, serving

from quire.bench.client import ServerError
from quire.bench.counters import TokenCounts
from quire.bench.report import as_json, counters_text
from quire.bench.serve import LoadConfig, Result, run


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.bench.serve.COUNTER_PATIENCE", 0.2)


@pytest.fixture
def script() -> Script:
    return Script()


SMALL = LoadConfig(num_prompts=12, concurrency=3, random_input_len=5, random_output_len=4)


async def load(script: Script, config: LoadConfig = SMALL) -> Result:
    async with serving(script) as url:
        return await run(replace(config, base_url=url))


async def test_closed_loop_holds_the_concurrency_and_counts_tokens(script: Script) -> None:
    result = await load(script)
    assert result.model == "tiny"
    assert (result.summary.completed, result.summary.errors) == (12, {})
    assert (result.summary.prompt_tokens, result.summary.output_tokens, result.summary.cached_tokens) == (60, 48, 12)
    assert script.most_in_flight == 3
    assert result.client_tokens == result.server_tokens == TokenCounts(60, 48)
    assert "equal" in counters_text(result).plain
    assert all(len(r.chunk_times) == 4 and r.finish_reason == "length" for r in result.records)
    assert len(script.bodies) == 13  # and one warm-up, with a prompt of its own
    assert len({tuple(body["prompt"]) for body in script.bodies}) == 13


async def test_requests_say_what_vllms_do(script: Script) -> None:
    await load(script, replace(SMALL, extra_body={"top_k": 5}))
    body = script.bodies[-1]
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_k"]) == ("tiny", 4, 0.0, 5)
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["ignore_eos"] is True


async def test_chat_is_not_timed_by_its_empty_opening(script: Script) -> None:
    result = await load(script, replace(SMALL, endpoint="/v1/chat/completions"))
    assert result.summary.errors == {}
    assert all(len(r.chunk_times) == 4 for r in result.records)
    assert all(r.ttft >= 2 * PAUSE * 0.9 for r in result.records)


async def test_open_loop_does_not_wait_for_answers(script: Script) -> None:
    result = await load(script, replace(SMALL, concurrency=None, request_rate=10_000.0))
    assert result.summary.completed == 12
    assert script.most_in_flight > 3
    dues = [r.due for r in result.records]
    assert dues == sorted(dues)
    assert all(r.sent >= r.due for r in result.records)


async def test_open_loop_with_a_cap(script: Script) -> None:
    result = await load(script, replace(SMALL, concurrency=2, request_rate=10_000.0))
    assert script.most_in_flight == 2
    assert result.summary.max_lateness > 0


async def test_sharegpt_like_fits_the_served_context(script: Script) -> None:
    result = await load(script, replace(SMALL, dataset="sharegpt-like", num_prompts=5))
    assert result.summary.completed == 5
    assert all(r.prompt_tokens + r.output_tokens <= 512 for r in result.records)


async def test_a_file_without_ignore_eos(script: Script, tmp_path: Any) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": [1, 2, 3], "max_tokens": 2}\n')
    result = await load(script, replace(SMALL, dataset=str(path)))
    assert result.summary.output_tokens == 24
    assert "ignore_eos" not in script.bodies[-1]


async def test_sharegpt_answers_are_measured_by_the_servers_tokenizer(script: Script, tmp_path: Any) -> None:
    path = tmp_path / "s.json"
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "three words long"}]
    path.write_text(json.dumps([{"conversations": turns}]))
    await load(script, replace(SMALL, dataset=str(path)))
    assert {body["max_tokens"] for body in script.bodies} == {3}


def only(victim: int, change: Callable[[list[str]], list[str]]) -> Callable[[int, list[str]], list[str]]:
    return lambda number, events: change(events) if number == victim else events


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("no [DONE]", lambda events: events[:-1]),
        ("no usage", lambda events: [*events[:-2], "[DONE]"]),
        ("no finish_reason", lambda events: [*events[:-3], *events[-2:]]),
        ("stream error", lambda events: [events[0], '{"error": {"message": "boom"}}', "[DONE]"]),
        ("malformed event", lambda events: ["{nonsense", *events]),
        ("connection: ClientPayloadError", lambda events: [events[0], "cut"]),
        (
            "wrong length",
            lambda events: [e.replace('"completion_tokens": 4', '"completion_tokens": 3') for e in events],
        ),
    ],
)
async def test_a_broken_stream_is_one_failed_request(
    script: Script, kind: str, change: Callable[[list[str]], list[str]]
) -> None:
    script.spoil = only(5, change)
    result = await load(script)
    assert result.summary.errors == {kind: 1}
    assert result.summary.completed == 11
    assert result.details.keys() == {kind}


async def test_refusals_are_counted_by_status(script: Script) -> None:
    script.status = lambda number: 503 if number % 2 else 200
    result = await load(script)
    assert result.summary.errors == {"HTTP 503": 6}
    assert "full" in result.details["HTTP 503"]


async def test_timeouts_are_counted(script: Script) -> None:
    script.spoil = lambda number, events: events * 500 if number == 5 else events
    result = await load(script, replace(SMALL, request_timeout=0.3))
    assert result.summary.errors == {"timeout": 1}


async def test_counters_that_disagree_are_shown(script: Script) -> None:
    script.uncounted = 3
    result = await load(script)
    assert result.server_tokens is not None
    assert result.server_tokens.prompt_tokens > result.client_tokens.prompt_tokens
    assert "differ" in counters_text(result).plain


async def test_json_is_plain_and_without_the_key(script: Script) -> None:
    result = await load(script, replace(SMALL, api_key="sk-secret", random_output_len=1))
    text = json.dumps(as_json(result), allow_nan=False)  # one token: no TPOT, no ITL
    assert "sk-secret" not in text + repr(result.config)
    report = json.loads(text)
    assert report["completed"] == 12
    assert report["p99_tpot_ms"] is None
    assert report["mean_ttft_ms"] > 0


async def test_the_same_seed_asks_the_same(script: Script) -> None:
    other = Script()
    await load(script, replace(SMALL, concurrency=1))
    await load(other, replace(SMALL, concurrency=1))
    assert script.bodies == other.bodies


async def test_no_server_says_how_to_start_one() -> None:
    with pytest.raises(ServerError, match="quire serve"):
        await run(LoadConfig(base_url="http://127.0.0.1:9"))


async def test_an_unknown_model_lists_what_there_is(script: Script) -> None:
    with pytest.raises(ServerError, match=r"gpt-9: the server has tiny"):
        await load(script, replace(SMALL, model="gpt-9"))


async def test_bundled_means_the_served_model(script: Script) -> None:
    assert (await load(script, replace(SMALL, model="bundled"))).model == "tiny"


@pytest.mark.parametrize(
    "bad",
    [
        {"num_prompts": 0},
        {"concurrency": 0},
        {"request_rate": -1.0},
        {"request_rate": float("nan")},
        {"endpoint": "/v1/embeddings"},
        {"percentiles": (101,)},
    ],
)
def test_impossible_settings_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--"):
        LoadConfig(**bad)
