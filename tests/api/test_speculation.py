"""Speculation as callers see it: what they may ask for, what their usage says, what Prometheus scrapes."""

from __future__ import annotations

import pytest

from quire.scheduler.params import Speculative

PATHS = ["/v1/completions", "/v1/chat/completions"]
PROMPT = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
DRAFTING = {
    "speculative_method": "draft",
    "speculative_tree": "rsd-c:2,2,1",
    "num_speculative_tokens": 3,
}


def tokens_of(usage):
    details = usage["completion_tokens_details"]
    return (
        usage["completion_tokens"],
        details["accepted_prediction_tokens"],
        details["rejected_prediction_tokens"],
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("wish", "arrives"),
    [
        ({}, Speculative()),
        (None, Speculative()),
        ({"method": None, "num_tokens": None}, Speculative()),
        ({"method": "none"}, Speculative(method="none")),
        ({"method": "none", "num_tokens": 0}, Speculative(method="none", num_tokens=0)),
        ({"method": "ngram", "num_tokens": 1}, Speculative(method="ngram", num_tokens=1)),
        ({"method": "draft"}, Speculative(method="draft")),
        ({"num_tokens": 3}, Speculative(num_tokens=3)),
        ({"num_tokens": 0}, Speculative(num_tokens=0)),
    ],
)
async def test_wishes_reach_the_engine(serve, fake, path, wish, arrives):
    fake.facts = DRAFTING
    async with serve() as http:
        response = await http.post(path, json={**PROMPT, "speculative": wish})
    assert response.status_code == 200, response.text
    assert [request.speculative for request in fake.added] == [arrives]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("wish", "param", "says"),
    [
        ({"method": "nested"}, "speculative.method", "must be one of none, ngram, draft, got 'nested'"),
        ({"method": ""}, "speculative.method", "must be one of none, ngram, draft, got ''"),
        ({"method": "x" * 500}, "speculative.method", "must be one of"),
        ({"method": 1}, "speculative.method", "string"),
        ({"method": ["ngram"]}, "speculative.method", "string"),
        ({"num_tokens": 4}, "speculative.num_tokens", "must be a whole number from 0 to 3, got 4"),
        ({"num_tokens": -1}, "speculative.num_tokens", "must be a whole number from 0 to 3, got -1"),
        ({"num_tokens": 2**63}, "speculative.num_tokens", ""),
        ({"num_tokens": "2"}, "speculative.num_tokens", "integer"),
        ({"num_tokens": 2.0}, "speculative.num_tokens", "integer"),
        ({"num_tokens": True}, "speculative.num_tokens", "integer"),
        ({"method": "none", "num_tokens": 2}, "speculative.num_tokens", "leave one of them out"),
        ({"tree": "chain"}, "speculative.tree", "is unknown; `speculative` holds method, num_tokens"),
        ({"method": "none", "x\n": 1}, "speculative.x\ufffd", "is unknown"),
        ("ngram", "speculative", ""),
        ([], "speculative", ""),
        (True, "speculative", ""),
    ],
)
async def test_what_the_engine_cannot_do_is_a_400(serve, fake, path, stream, wish, param, says):
    fake.facts = DRAFTING
    async with serve() as http:
        response = await http.post(path, json={**PROMPT, "speculative": wish, "stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 300
    assert fake.added == []


async def test_without_speculation_only_its_absence_can_be_asked_for(http, fake):
    for wish in ({"method": "none"}, {"num_tokens": 0}):
        assert (await http.post("/v1/completions", json={**PROMPT, "speculative": wish})).status_code == 200
    for wish in ({"method": "ngram"}, {"num_tokens": 1}):
        response = await http.post("/v1/completions", json={**PROMPT, "speculative": wish})
        assert response.status_code == 400
        assert "--speculative-method" in response.json()["error"]["message"]
    assert len(fake.added) == 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("per_step", [1, 2, 5, 50])
@pytest.mark.parametrize("stop", [[], ["Hello, world?", "o, wow"]])
async def test_a_streams_usage_is_that_of_the_whole(http, fake, events, path, per_step, stop):
    """At n samples too, and with text held back that might have become a stop string."""
    fake.tokens_per_step, fake.draft = per_step, 6
    body = {**PROMPT, "n": 3, "max_tokens": 9, "stop": stop}
    whole = (await http.post(path, json=body)).json()["usage"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    assert events((await http.post(path, json=body)).text)[-1]["usage"] == whole
    steps = -(-9 // per_step)
    accepted = sum(min(6, min(per_step, 9 - step * per_step) - 1) for step in range(steps))
    assert tokens_of(whole) == (27, 3 * accepted, 3 * (6 * steps - accepted))


@pytest.mark.parametrize("stream", [True, False])
async def test_guesses_behind_a_stop_string_were_in_vain(http, fake, events, stream):
    """Seven tokens in a step of which the text ends at the third: three were drawn, and six were guessed."""
    fake.answer = lambda request, index: [*b"Hello,", 33]
    fake.tokens_per_step, fake.draft = 7, 6
    body = {**PROMPT, "stop": ["l"]}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        usage = events((await http.post("/v1/completions", json=body)).text)[-1]["usage"]
    else:
        usage = (await http.post("/v1/completions", json=body)).json()["usage"]
    assert tokens_of(usage) == (3, 3, 3)


async def test_continuous_usage_grows(http, fake, events):
    fake.tokens_per_step, fake.draft = 2, 3
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await http.post("/v1/completions", json={**PROMPT, "stream": True, "stream_options": options})
    told = [tokens_of(event["usage"]) for event in events(response.text)]
    assert told == sorted(told)
    assert told[-1] == told[-2] == (14, 7, 14)


async def test_nothing_guessed_is_zero(http):
    usage = (await http.post("/v1/completions", json=PROMPT)).json()["usage"]
    assert tokens_of(usage) == (14, 0, 0)


async def test_version_tells_what_was_resolved(serve, fake):
    fake.facts = {**DRAFTING, "speculative_adaptive": False}
    async with serve() as http:
        facts = (await http.get("/version")).json()
    assert {name: facts[name] for name in fake.facts} == fake.facts


FIGURES = {
    "draft_tokens_total": 30,
    "accepted_tokens_total": 12,
    "draft_failures_total": 2,
    "drafted_by_position": [8, 5],
    "accepted_by_position": [7, 5],
    "draft_depths": [4, 3, 5],
    "draft_seconds": 0.25,
}
PLAIN = {
    "num_drafts_total": 8,
    "num_draft_tokens_total": 30,
    "num_accepted_tokens_total": 12,
    "num_wasted_tokens_total": 18,
    "failures_total": 2,
    "seconds_total": 0.25,
    "acceptance_length": 2.5,
    "depth_count": 12,
    "depth_sum": 3 + 2 * 5,
}
LABELLED = {
    'num_drafts_per_pos_total{model_name="tiny",position="0"}': 8,
    'num_drafts_per_pos_total{model_name="tiny",position="1"}': 5,
    'num_drafts_per_pos_total{model_name="tiny",position="2"}': 0,
    'num_accepted_tokens_per_pos_total{model_name="tiny",position="1"}': 5,
    'num_accepted_tokens_per_pos_total{model_name="tiny",position="2"}': 0,
    'depth_bucket{le="0.0",model_name="tiny"}': 4,
    'depth_bucket{le="1.0",model_name="tiny"}': 7,
    'depth_bucket{le="3.0",model_name="tiny"}': 12,
    'depth_bucket{le="+Inf",model_name="tiny"}': 12,
}


def series(text, prefix):
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(prefix))
    return {name: float(value) for name, value in lines}


async def test_metrics_follow_the_engines_figures(serve, fake, eventually):
    fake.facts, fake.figures = DRAFTING, {**FIGURES, "steps_total": 1}
    async with serve(vllm_metrics=True) as http:
        before = series((await http.get("/metrics")).text, "quire_spec_decode_")
        fake.report()
        await eventually(lambda: http.app.state.quire.metrics.stats.steps_total == 1)
        text = (await http.get("/metrics")).text
    now = series(text, "quire_spec_decode_")
    assert set(now) == set(before), "series are there from the start"
    expected = {f'quire_spec_decode_{name}{{model_name="tiny"}}': value for name, value in PLAIN.items()}
    expected |= {f"quire_spec_decode_{name}": value for name, value in LABELLED.items()}
    assert {name: now.get(name) for name in expected} == expected
    aliases = series(text, "vllm:spec_decode_")
    for name in ("num_drafts_total", "num_draft_tokens_total", "num_accepted_tokens_total"):
        assert aliases[f'vllm:spec_decode_{name}{{engine="0",model_name="tiny"}}'] == PLAIN[name]
    first = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="0"}'
    assert aliases[first] == 7


async def test_before_the_first_draft_the_acceptance_length_is_one(serve, fake):
    fake.facts = DRAFTING
    async with serve() as http:
        samples = series((await http.get("/metrics")).text, "quire_spec_decode_")
    assert samples['quire_spec_decode_acceptance_length{model_name="tiny"}'] == 1


async def test_an_engine_that_does_not_speculate_has_no_such_series(http):
    samples = series((await http.get("/metrics")).text, "quire_spec_decode_")
    assert set(samples) == {'quire_spec_decode_seconds_total{model_name="tiny"}'}
