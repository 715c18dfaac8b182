"""/v1/completions: shapes, order, echo, log-probabilities, and the wire to the letter."""

from __future__ import annotations

import re

import pytest

from quire.engine.validation import check_params
from quire.server import inputs

EOS = 256


async def complete(http, **body):
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_whole_answer(http, fake):
    answer = await complete(http, prompt="Hi", max_tokens=50)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {"index": 0, "text": "Hello, world!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 14,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }
    assert fake.added[0].prompt_ids == list(b"Hi")


async def test_max_tokens_defaults_to_sixteen_and_shrinks_to_what_fits(http, fake):
    fake.answer = lambda request, index: [97] * 600
    assert (await complete(http, prompt="x"))["usage"]["completion_tokens"] == 16
    assert (await complete(http, prompt="x" * 510))["usage"]["completion_tokens"] == 2


async def test_sampling_parameters_reach_the_engine(http, fake):
    body = {
        "prompt": "x",
        "max_tokens": 9,
        "n": 2,
        "temperature": 1.5,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.25,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "seed": -7,
        "min_tokens": 1,
        "stop_token_ids": [5],
        "ignore_eos": True,
        "logit_bias": {"5": 2, "6": -3.5},
        "allowed_token_ids": [5, 6, 7],
        "bad_words": ["no"],
        "logprobs": 2,
        "cache_salt": "pepper",
    }
    await complete(http, **body)
    request = fake.added[0]
    assert request.cache_salt != ""
    assert "pepper" not in request.cache_salt
    params = request.params
    for name in ("max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"):
        assert getattr(params, name) == body[name], name
    for name in ("repetition_penalty", "seed", "min_tokens", "ignore_eos", "logprobs"):
        assert getattr(params, name) == body[name], name
    assert params.stop_token_ids == (5,)
    assert params.allowed_token_ids == (5, 6, 7)
    assert params.logit_bias == {5: 2.0, 6: -3.5}
    assert params.bad_words == (tuple(b"no"), tuple(b" no"))


async def test_unset_fields_take_the_models_defaults_then_openais(serve, fake):
    async with serve() as http:
        await complete(http, prompt="x")
        await complete(http, prompt="x", temperature=1.0, top_k=-1)
        await complete(http, prompt="x")
    first, second, third = (request.params for request in fake.added)
    assert (first.temperature, first.top_k, first.top_p) == (0.5, 7, 1.0)  # generation_config.json of the fixture
    assert (second.temperature, second.top_k) == (1.0, 0)
    assert first.seed != third.seed


async def test_model_defaults_can_be_switched_off(serve, fake):
    async with serve(generation_config="none") as http:
        await complete(http, prompt="x")
    assert (fake.added[0].params.temperature, fake.added[0].params.top_k) == (1.0, 0)


async def test_null_means_default_for_every_field(http, fake):
    from quire.server.protocol import CompletionBody

    body = dict.fromkeys(CompletionBody.model_fields, None) | {
        "prompt": "Hi",
        "suffix": None,
        "tools": None,
        "user": None,
    }
    answer = await complete(http, **body)
    assert answer["choices"][0]["text"] == "Hello, world!"


async def test_unknown_and_harmless_fields_are_accepted(http):
    await complete(http, prompt="x", brand_new_field={"a": 1}, user="me", metadata={}, store=True, service_tier="auto")
    await complete(http, prompt="x", suffix="", best_of=1, n=1, response_format={"type": "text"})


async def test_prompts_times_samples_are_indexed_in_order(http, fake):
    fake.answer = lambda request, index: [*bytes(request.prompt_ids), *str(index).encode(), EOS]
    answer = await complete(http, prompt=["a", "b", "c"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert answer["usage"]["prompt_tokens"] == 3


async def test_prompts_as_token_ids(http, fake):
    await complete(http, prompt=[72, 105])
    await complete(http, prompt=[[72], [105, 33]])
    assert [request.prompt_ids for request in fake.added] == [[72, 105], [72], [105, 33]]


async def test_echo_with_logprobs_is_one_aligned_whole(http, fake):
    fake.answer = lambda request, index: [*b"!"]
    answer = await complete(http, prompt=list("hé".encode()), echo=True, logprobs=1, max_tokens=1)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hé!"
    assert logprobs["tokens"] == ["h", "\ufffd", "\ufffd", "!"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value is not None for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][-1] == 2
    # An evaluation harness calls a token greedy if these two are exactly equal.
    assert logprobs["token_logprobs"][3] == logprobs["top_logprobs"][3]["!"]


async def test_echo_without_generation(http):
    answer = await complete(http, prompt="Hi", echo=True, max_tokens=0, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "Hi"
    assert choice["logprobs"]["tokens"] == ["H", "i"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_an_echo_of_what_was_kept_is_its_own_text(http, fake):
    body = {"truncate_prompt_tokens": 3, "echo": True, "logprobs": 0, "max_tokens": 2}
    (choice,) = (await complete(http, prompt="0123456789", **body))["choices"]
    assert choice["text"] == "789He"
    assert choice["logprobs"]["tokens"] == list("789He")
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


async def test_logprobs_lie_beside_their_tokens_at_every_n(http, fake):
    answer = await complete(http, prompt="x", n=3, logprobs=2, max_tokens=4)
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == list("Hell")
        assert logprobs["text_offset"] == [0, 1, 2, 3]
        assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


async def test_prompt_logprobs(http):
    answer = await complete(http, prompt="Hi!", prompt_logprobs=1)
    first, second, _ = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second["105"] == {"logprob": -0.625, "rank": 1, "decoded_token": "i"}


async def test_token_ids_come_back_when_asked_for(http):
    (choice,) = (await complete(http, prompt="Hi", max_tokens=2, return_token_ids=True))["choices"]
    assert choice["prompt_token_ids"] == [72, 105]
    assert choice["token_ids"] == [72, 101]


async def test_truncation_keeps_the_end(http, fake):
    await complete(http, prompt="abcdef", truncate_prompt_tokens=2)
    await complete(http, prompt=[97] * 600 + [98], truncate_prompt_tokens=-1, max_tokens=12)
    assert fake.added[0].prompt_ids == list(b"ef")
    assert len(fake.added[1].prompt_ids) == 500
    assert fake.added[1].prompt_ids[-1] == 98


async def test_parameters_are_made_and_checked_once_for_all_prompts(http, fake, monkeypatch):
    checked = []
    monkeypatch.setattr(inputs, "check_params", lambda *given: (checked.append(given), check_params(*given)))
    await complete(http, prompt=["a"] * 50, max_tokens=1, allowed_token_ids=[5, 6, 7])
    assert len(checked) == 1
    assert len({id(request.params.allowed_token_ids) for request in fake.added}) == 1
    assert len({request.params.seed for request in fake.added}) == 50  # or equal prompts had equal answers


async def test_prompts_of_one_call_get_what_is_left_of_the_context_for_each(http, fake):
    fake.answer = lambda request, index: [97] * 600
    await complete(http, prompt=["x" * 510, "x", "x" * 509])
    assert [request.params.max_tokens for request in fake.added] == [2, 16, 3]


@pytest.mark.parametrize(
    ("field", "value", "size"),
    [
        ("allowed_token_ids", list(range(4097)), 4097),
        ("bad_words", [f"{i} " + "x" * 40 for i in range(100)], 8680),  # each with and without a space before it
    ],
)
async def test_what_each_prompt_carries_is_bounded_for_all_together(fake, serve, field, value, size):
    fake.facts = {"vocab_size": 5000}
    async with serve() as http:
        response = await http.post("/v1/completions", json={"prompt": ["a"] * 1024, "max_tokens": 1, field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    for part in (f"`{field}`", f"{size} token ids", "1024 prompts", "send fewer prompts"):
        assert part in error["message"]
    assert not fake.added


async def test_a_thousand_prompts_may_carry_some_thousand_ids_each(fake, serve):
    fake.facts = {"vocab_size": 5000}
    bias = {str(i): 1.0 for i in range(1024)}
    body = {"prompt": ["a"] * 1024, "max_tokens": 1, "allowed_token_ids": list(range(4096)), "logit_bias": bias}
    async with serve() as http:
        answer = await complete(http, **body)
    assert len(answer["choices"]) == 1024


async def test_stop_reason_is_the_token_or_the_string(http, fake):
    (choice,) = (await complete(http, prompt="x", stop_token_ids=[ord("o")]))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", ord("o"), "Hell")
    (choice,) = (await complete(http, prompt="x", stop=["nope", "wor"]))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", "wor", "Hello, ")


async def test_the_wire_to_the_letter(http, fake):
    """The bytes of a stream: framing, field order, usage last, [DONE]."""
    fake.answer = lambda request, index: [*b"a\nb"]
    fake.num_cached = 1
    fake.tokens_per_step = 3  # one event: how many steps an event takes in depends on who is faster
    body = {"prompt": "Hi", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    response = await http.post("/v1/completions", json=body, headers={"X-Request-Id": "golden"})
    head = '{"id":"cmpl-golden","object":"text_completion","created":0,"model":"tiny","choices":['
    tail = '],"usage":null}'

    choice = '{"index":0,"text":"a\\nb","logprobs":null,"finish_reason":"length","stop_reason":null}'
    assert re.sub(r'"created":\d+', '"created":0', response.text) == (
        f"data: {head}{choice}{tail}\n\n"
        + f'data: {head}],"usage":{{"prompt_tokens":2,"completion_tokens":3,"total_tokens":5,'
        + '"prompt_tokens_details":{"cached_tokens":1},'
        + '"completion_tokens_details":{"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}\n\n'
        + "data: [DONE]\n\n"
    )
    assert response.headers["x-request-id"] == "golden"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


async def test_streamed_echo_opens_each_choice_once(stream, fake):
    events = await stream("/v1/completions", prompt="Hi", echo=True, n=2, logprobs=0, max_tokens=3)
    for index in (0, 1):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in choices) == "HiHel"
        assert [t for choice in choices for t in choice["logprobs"]["tokens"]] == list("HiHel")
        assert [o for choice in choices for o in choice["logprobs"]["text_offset"]] == [0, 1, 2, 3, 4]
