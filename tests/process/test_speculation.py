"""Speculation through a real server and its engine's process, one for each method: what may be asked, what is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

METHODS = {"ngram": None, "draft": "the target", "nested": "h/2", "layers": "0,1"}
MOTIF = [7, 31, 8, 90, 14] * 4  # repeats itself, so that look-ups find something


def body_of(**fields: Any) -> dict[str, Any]:
    return {"prompt": MOTIF, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}


def told(usage: dict[str, Any]) -> tuple[int, int]:
    """Guesses that were accepted, and that were not."""
    details = usage["completion_tokens_details"]
    return details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]


def streamed(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("method", METHODS)
def test_a_server_of_each_method(start_server: Callable[..., Any], tiny_model: Path, method: str):
    model = METHODS[method] and ["--speculative-model", METHODS[method].replace("the target", str(tiny_model))]
    server = start_server(
        *("--speculative-method", method, "--speculative-tree", "rsd-c:2,1,1", "--speculative-adaptive", "off"),
        *(model or []),
    )

    def post(**fields: Any) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/completions", json=body_of(**fields), timeout=60)

    wishes = [
        {"method": "none"},
        None,
        {"method": method},
        {"method": "ngram"},
        {"num_tokens": 1},
        {"num_tokens": 0},
        {"method": method, "num_tokens": 2},
    ]
    answers = [post(speculative=wish).json() for wish in wishes]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {24}
    usages = [answer["usage"] for answer in answers]
    for wish, usage in zip(wishes, usages, strict=True):
        accepted, rejected = told(usage)
        looked_up = wish == {"method": "ngram"} or method == "ngram"  # which finds something sooner or later
        if wish in ({"method": "none"}, {"num_tokens": 0}):
            assert (accepted, rejected) == (0, 0)
        else:
            assert accepted > 0 or looked_up
            assert accepted + rejected <= 6 * 23  # the nodes of the shape, in as many steps as there are tokens
    assert max(told(usage)[0] for usage in usages) < 24
    assert told(usages[4])[0] <= 12  # one in a step, beside the token that follows it

    sampled = [body_of(temperature=0.9, seed=i, n=2, logprobs=1, min_tokens=24) for i in range(3)]
    answers = [httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json() for body in sampled]
    for answer in answers:
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
        assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [24] * 2
        assert answer["choices"][0]["text"] != answer["choices"][1]["text"]
        assert sum(told(answer["usage"])) > 0 or method == "ngram"
        usages.append(answer["usage"])

    stream = post(stream=True, stream_options={"include_usage": True}).text
    events = list(streamed(stream))
    usages.append(events[-1]["usage"])
    assert told(usages[-1]) == told(usages[1]) or method == "ngram"  # which has read the answers before

    others = [other for other in METHODS if other not in (method, "ngram")]
    for wish in (
        {"num_tokens": 4},
        {"num_tokens": -1},
        {"method": "none", "num_tokens": 1},
        *({"method": o} for o in others),
    ):
        refused = post(speculative=wish)
        assert refused.status_code == 400, wish
        assert refused.json()["error"]["param"].startswith("speculative.")

    def counted(name: str, expected: int) -> None:
        server.wait_for(lambda: server.metric(name) == expected)

    accepted, rejected = (sum(column) for column in zip(*map(told, usages), strict=True))
    assert accepted > 0
    counted("quire_spec_decode_num_accepted_tokens_total", accepted)
    counted("quire_spec_decode_num_draft_tokens_total", accepted + rejected)
    counted("quire_spec_decode_num_wasted_tokens_total", rejected)
    counted("quire_generation_tokens_total", sum(usage["completion_tokens"] for usage in usages))
    assert server.metric("quire_spec_decode_num_drafts_total") > 0
    assert server.metric("quire_spec_decode_failures_total") == 0


def test_a_server_without_speculation_refuses_each_method(start_server: Callable[..., Any]):
    server = start_server()
    for method in METHODS:
        refused = httpx.post(f"{server.url}/v1/completions", json=body_of(speculative={"method": method}), timeout=60)
        assert refused.status_code == 400
        assert "--speculative-method" in refused.json()["error"]["message"]
    answer = httpx.post(f"{server.url}/v1/completions", json=body_of(speculative={"method": "none"}), timeout=60).json()
    assert told(answer["usage"]) == (0, 0)
