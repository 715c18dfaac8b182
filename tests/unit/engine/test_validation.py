"""Every field by every kind of nonsense: a refusal that names the field, never another exception."""

from __future__ import annotations

from typing import Any

import pytest

from quire.engine.errors import RequestError, TooLongError
from quire.engine.messages import AddRequest
from quire.engine.validation import (
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_STOP_CHARS,
    Limits,
    check_length,
    check_order,
    check_params,
    check_promises,
    check_request,
    check_speculative,
    check_stop,
    clamp_logit_bias,
    shown,
    valid_token_ids,
)
from quire.scheduler.params import Repetition, SamplingParams, Slo, Speculative, Thinking

TOKENIZER_LEN, VOCAB = 330, 384  # the logits are wider than the tokenizer is long
LIMITS = Limits(VOCAB, 512, max_n=MAX_N)
NAN, INF = float("nan"), float("inf")
GOOD: dict[str, Any] = {"max_tokens": 16}
BAD_IDS = [-(2**63), -1, VOCAB, 2**31, 2**63, 10**5000, 1.0, True, None, "1", NAN]
GOOD_IDS = [0, TOKENIZER_LEN - 1, TOKENIZER_LEN, VOCAB - 1]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{**GOOD, **changes})


def put(field: str, token_id: object) -> SamplingParams:
    """Parameters with one id in the named field."""
    values: dict[str, Any] = {
        "stop_token_ids": (token_id,),
        "logit_bias": {token_id: 1.0},
        "allowed_token_ids": (token_id,),
        "bad_words": ((token_id,),),
    }
    return params(**{field: values[field]})


ID_FIELDS = ["stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words"]


@pytest.mark.parametrize("field", ID_FIELDS)
@pytest.mark.parametrize("token_id", BAD_IDS, ids=shown)
def test_ids_outside_the_logits_are_refused_everywhere(field: str, token_id: object) -> None:
    with pytest.raises(RequestError, match="is not a token id") as caught:
        check_params(put(field, token_id), LIMITS)
    assert caught.value.param == field
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("field", ID_FIELDS)
@pytest.mark.parametrize("token_id", GOOD_IDS)
def test_ids_inside_the_logits_are_taken_everywhere(field: str, token_id: int) -> None:
    check_params(put(field, token_id), LIMITS)


@pytest.mark.parametrize("token_id", BAD_IDS, ids=shown)
def test_prompt_ids(token_id: object) -> None:
    with pytest.raises(RequestError, match=r"^prompt\[1\] = "):
        valid_token_ids([0, token_id], VOCAB, "prompt")
    valid_token_ids(GOOD_IDS, VOCAB, "prompt")


NEVER_A_NUMBER = ["1", None, True, [], {}, 1j]
WHOLE = {
    "max_tokens": [-1, 513, 2**63, 10**5000],
    "min_tokens": [-1, 17, 2**63],
    "n": [0, -1, MAX_N + 1, 2**31, 2**63, 10**5000],
    "top_k": [-2, 2**31, 2**63],
    "seed": [2**63, -(2**63) - 1, 10**5000],
    "logprobs": [-2, 21, 2**31],
    "prompt_logprobs": [-2, 21, 2**31],
}
REAL = {
    "temperature": [-0.01, 2.01],
    "top_p": [0, 0.0, -0.1, 1.01],
    "min_p": [-0.1, 1.01],
    "presence_penalty": [-2.01, 2.01],
    "frequency_penalty": [-2.01, 2.01],
    "repetition_penalty": [0, -1, 100.1],
}
CASES = [
    *((name, value) for name, values in WHOLE.items() for value in [*values, 1.0, 1e308, NAN, INF, *NEVER_A_NUMBER]),
    *(
        (name, value)
        for name, values in REAL.items()
        for value in [*values, 1e308, NAN, INF, -INF, 10**400, *NEVER_A_NUMBER]
    ),
    ("ignore_eos", 1),
    ("ignore_eos", "no"),
    ("stop_token_ids", tuple(range(129))),
    ("stop_token_ids", 5),
    ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
    *(("logit_bias", {3: value}) for value in [NAN, INF, 1e308, 100.5, -101, "1", True, None]),
    ("allowed_token_ids", ()),
    ("bad_words", ((),)),
    ("bad_words", ((1,),) * 257),
]


@pytest.mark.parametrize(("field", "value"), CASES, ids=shown)
def test_nonsense_is_refused_by_name(field: str, value: object) -> None:
    if value is None and field in ("logprobs", "prompt_logprobs"):
        check_params(params(**{field: value}), LIMITS)
        return
    with pytest.raises(RequestError) as caught:
        check_params(params(**{field: value}), LIMITS)
    assert caught.value.param == field
    assert field in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("field", ["max_pattern_size", "min_pattern_size", "min_count"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, True, "3"])
def test_repetitions_that_are_none(field: str, value: Any) -> None:
    wish = Repetition(**{"max_pattern_size": 8, "min_pattern_size": 4, "min_count": 3, field: value})
    with pytest.raises(RequestError) as caught:
        check_params(params(repetition=wish), LIMITS)
    assert caught.value.param == f"repetition_detection.{field}"


def test_named_logprobs_need_logprobs_and_ids_of_this_model() -> None:
    for changes in (
        {},
        {"logprobs": 0, "logprob_token_ids": (VOCAB,)},
        {"logprobs": 0, "logprob_token_ids": (1,) * 513},
    ):
        with pytest.raises(RequestError) as caught:
            check_params(params(**{"logprob_token_ids": (1,), **changes}), LIMITS)
        assert caught.value.param == "logprob_token_ids"


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0},
        {"temperature": 2, "top_p": 1, "min_p": 1, "top_k": -1},
        {"max_tokens": 0},
        {"max_tokens": 16, "min_tokens": 16},
        {"n": MAX_N},
        {"seed": -(2**63)},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.5},
        {"logprobs": 0, "prompt_logprobs": 20, "logprob_token_ids": tuple(range(384))},
        {"repetition": Repetition(max_pattern_size=1)},
        {"logit_bias": {0: -100, 383: 100.0}},
        {"bad_words": ((1, 2),), "allowed_token_ids": tuple(range(VOCAB))},
    ],
)
def test_the_edges_are_inside(changes: dict[str, Any]) -> None:
    check_params(params(**changes), LIMITS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 3}, "temperature must be in [0, 2]"),
        ({"top_p": 0}, "top_p must be in (0, 1]"),
        ({"presence_penalty": 9}, "presence_penalty must be in [-2, 2]"),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling"),
        ({"logprobs": -5}, "logprobs must be a positive value or -1"),
    ],
)
def test_the_words_that_clients_know(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_params(params(**changes), LIMITS)
    assert says in str(caught.value)


def test_the_whole_vocabulary_only_where_it_is_allowed() -> None:
    everything = params(logprobs=-1)
    with pytest.raises(RequestError, match="at most 20"):
        check_params(everything, LIMITS)
    check_params(everything, Limits(VOCAB, 512, max_logprobs=-1))
    with pytest.raises(RequestError):
        check_params(params(logprobs=VOCAB + 1), Limits(VOCAB, 512, max_logprobs=-1))


def test_length_opens_with_the_words_that_clients_match() -> None:
    check_length(500, 12, 512)
    check_length(512, 0, 512)
    with pytest.raises(TooLongError, match=r"^This model's maximum context length is 512 tokens\. However, ") as caught:
        check_length(501, 12, 512)
    assert "513 tokens (501 in the prompt, 12 for the completion)" in str(caught.value)
    with pytest.raises(TooLongError, match=r"^This model's maximum context length is 512 tokens\. However, "):
        check_params(params(max_tokens=513), LIMITS)
    with pytest.raises(RequestError, match="no tokens"):
        check_length(0, 1, 512)


def test_stop_strings() -> None:
    check_stop(("a", "b" * MAX_STOP_CHARS, "🙂", "\n"))
    for stop, says in (
        (("a", ""), "stop cannot contain an empty string"),
        (("a",) * 5, "at most 4"),
        (("a" * (1 << 20),), "1048576 characters"),
        ((b"a",), "must hold strings"),
        ((None,), "must hold strings"),
    ):
        with pytest.raises(RequestError, match=says) as caught:
            check_stop(stop)
        assert caught.value.param == "stop"


def test_logit_bias_is_clamped_and_nonsense_is_left_for_the_check() -> None:
    assert clamp_logit_bias({1: 1e308, 2: -INF, 3: 5, 4: 10**400}) == {1: 100, 2: -100, 3: 5, 4: 100}
    nonsense = clamp_logit_bias({1: NAN})
    with pytest.raises(RequestError, match=r"logit_bias\[1\]"):
        check_params(params(logit_bias=nonsense), LIMITS)


def test_the_engine_checks_the_whole_message() -> None:
    check_request(AddRequest("r", [1, 2], params()), LIMITS)
    for request, param in (
        (AddRequest("r", [], params()), "prompt"),
        (AddRequest("r", [VOCAB], params()), "prompt"),
        (AddRequest("r", [1] * 500, params()), "prompt"),
        (AddRequest("r", [1], params(n=0)), "n"),
        (AddRequest("r", [1], params(), priority=2**70), "priority"),
        (AddRequest("r", [1], params(), priority=1), "priority"),
        (AddRequest("r", [1], params(), tenant="x" * 65), "tenant"),
        (AddRequest("r", [1], params(), tenant="\ud800"), "tenant"),
        (
            AddRequest("r", [1], params(thinking=Thinking(start_ids=(1,), end_ids=(2,), budget=2**64))),
            "thinking_token_budget",
        ),
        (AddRequest("r", [1], params(), weight=0.0), "weight"),
        (AddRequest("r", [1], params(), weight=NAN), "weight"),
        (AddRequest("r", [1], params(), slo=Slo(ttft=-1.0)), "slo.ttft_ms"),
        (AddRequest("r", [1], params(), timeout=NAN), "timeout"),
        (AddRequest("r", [1], params(), cache_salt="x" * 1000), "cache_salt"),
        (AddRequest("r", [1], params(), cache_salt="\ud800" * 129), "cache_salt"),
        (AddRequest("r", [1], params(), cache_salt="\ud800"), "cache_salt"),
    ):
        with pytest.raises(RequestError) as caught:
            check_request(request, LIMITS)
        assert caught.value.param == param


PROMISES = {"ttft": (0.001, 3600.0), "itl": (0.001, 60.0), "deadline": (0.001, 86400.0)}
NEVER_SECONDS = [0, -1, 0.0009, NAN, INF, -INF, 1e308, 10**5000, "1", True, [], {}]


@pytest.mark.parametrize("name", PROMISES)
@pytest.mark.parametrize("value", NEVER_SECONDS, ids=shown)
def test_promises_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^slo\.{name}_ms must be in \[1, ") as caught:
        check_promises(Slo(**{name: value}), None)
    assert caught.value.param == f"slo.{name}_ms"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", PROMISES)
def test_promises_at_the_edges(name: str) -> None:
    low, high = PROMISES[name]
    for value in (None, low, high, 1):
        check_promises(Slo(**{name: value}), None)
    with pytest.raises(RequestError):
        check_promises(Slo(**{name: high + 1}), None)


def test_a_promise_is_told_in_milliseconds() -> None:
    with pytest.raises(RequestError, match=r"^slo.itl_ms must be in \[1, 60000\], got 61000\.0$"):
        check_promises(Slo(itl=61.0), None)


@pytest.mark.parametrize("value", [*NEVER_SECONDS, 86401.0], ids=shown)
def test_timeouts_that_are_none(value: Any) -> None:
    with pytest.raises(RequestError, match=r"^timeout must be in \[0.001, 86400\]") as caught:
        check_promises(Slo(), value)
    assert caught.value.param == "timeout"


def test_timeouts_at_the_edges() -> None:
    for value in (None, 0.001, 1, 86400, 86400.0):
        check_promises(Slo(), value)


@pytest.mark.parametrize("policy", ["fcfs", "fair", "deadline"])
def test_priorities_only_where_they_are_heeded(policy: str) -> None:
    limits = Limits(VOCAB, 512, policy=policy)
    check_order(0, "", limits)
    for priority in (1, -1, 2**62):
        with pytest.raises(RequestError, match=f"schedules by '{policy}'.*--scheduling-policy priority"):
            check_order(priority, "", limits)
        check_order(priority, "", Limits(VOCAB, 512, policy="priority"))
    for nonsense in (2**63, 1.0, True, None, "1"):
        with pytest.raises(RequestError, match="priority"):
            check_order(nonsense, "", Limits(VOCAB, 512, policy="priority"))  # type: ignore[arg-type]


def test_tenants() -> None:
    named = Limits(VOCAB, 512, tenants=frozenset({"a", "é"}))
    for tenant in ("a", "é"):
        check_order(0, tenant, named)
    for tenant in ("", "b", "A", "a ", "x" * 65, "é" * 33, None, 5, ["a"], b"a"):
        with pytest.raises(RequestError) as caught:
            check_order(0, tenant, named)  # type: ignore[arg-type]
        assert caught.value.param == "tenant"
    for tenant in ("", "anybody", "x" * 64):
        check_order(0, tenant, LIMITS)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (Speculative(method="nested"), r"speculative\.method must be one of none, ngram, draft, got 'nested'$"),
        (Speculative(method=["ngram"]), r"speculative\.method must be one of none, ngram, draft, got a list$"),  # type: ignore[arg-type]
        (Speculative(num_tokens=4), r"speculative\.num_tokens must be a whole number from 0 to 3, got 4$"),
        (Speculative(num_tokens=-1), r"speculative\.num_tokens must be a whole number from 0 to 3, got -1$"),
        (Speculative(num_tokens=True), r"speculative\.num_tokens must be a whole number"),
        (Speculative(num_tokens=2.0), r"speculative\.num_tokens must be a whole number"),  # type: ignore[arg-type]
        (Speculative(num_tokens=10**5000), r"speculative\.num_tokens must be a whole number"),
        (Speculative(method="none", num_tokens=1), r"speculative\.num_tokens is 1, but .* leave one of them out$"),
    ],
)
def test_drafts_that_an_engine_does_not_make(wish: Speculative, says: str) -> None:
    limits = Limits(VOCAB, 512, draft_methods=("none", "ngram", "draft"), draft_depth=3)
    with pytest.raises(RequestError, match=says) as caught:
        check_speculative(wish, limits)
    assert caught.value.param in says.replace("\\", "")
    with pytest.raises(RequestError, match=says):
        check_request(AddRequest("r", [1], params(), speculative=wish), limits)


def test_drafts_that_it_makes_and_none_where_it_makes_none() -> None:
    limits = Limits(VOCAB, 512, draft_methods=("none", "ngram", "draft"), draft_depth=3)
    for method in (None, "ngram", "draft"):
        for num_tokens in (None, 0, 1, 3):
            check_speculative(Speculative(method=method, num_tokens=num_tokens), limits)
            if method or num_tokens:
                with pytest.raises(RequestError, match="unless started with --speculative-method"):
                    check_speculative(Speculative(method=method, num_tokens=num_tokens), LIMITS)
    for limited in (limits, LIMITS):
        for wish in (Speculative(), Speculative(method="none"), Speculative(method="none", num_tokens=0)):
            check_speculative(wish, limited)


def test_n_is_bounded_by_the_engine_at_hand() -> None:
    check_params(params(n=7), Limits(VOCAB, 512, max_n=7))
    with pytest.raises(RequestError, match="n must be a whole number from 1 to 7, got 8"):
        check_params(params(n=8), Limits(VOCAB, 512, max_n=7))
    assert Limits(VOCAB, 512).max_n == 128


@pytest.mark.parametrize("value", [10**5000, "x" * 10**6, [1] * 10**5, NAN, None, True, object(), "\x00\n"], ids=shown)
def test_values_are_shown_short_and_on_one_line(value: object) -> None:
    text = shown(value)
    assert 0 < len(text) <= 48
    assert "\n" not in text
    assert "0x" not in text
