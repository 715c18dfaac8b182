"""What a request is charged in advance, and what of it teaches how long tokens and samples are. A token is a byte."""

from __future__ import annotations

import hashlib
import json

import pytest

from quire.server.cost import Asked, Encoded, Experience

INPUT = "I was charged twice. " * 10
QUESTION = {"type": "predicate", "instructions": "It is urgent."}


@pytest.fixture
async def taught(serve, fake):
    """A server that has learned that a token is a byte, and that samples have 14 tokens."""
    fake.facts = {"max_model_len": 4096}
    async with serve() as http:
        for _ in range(30):
            await post(http, "/v1/completions", prompt="x" * 400)
        yield http


async def post(http, path, **body):
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def experience(http) -> Experience:
    return http.app.state.quire.experience


def tokens_of(http, num_bytes: int) -> float:
    return experience(http).prompt_tokens(Asked(prompt_bytes=num_bytes))


def usual_sample(http) -> int:
    return experience(http).most_tokens(Asked(max_tokens=None))


# ---------------------------------------------------------------- what is charged


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/decisions", {"input": INPUT, "questions": [QUESTION] * 40}),
        ("/v1/completions", {"prompt": "x" * 3000, "truncate_prompt_tokens": 7}),
        ("/v1/completions", {"prompt": ["x" * 3000, "y" * 3000], "truncate_prompt_tokens": 1000}),
        ("/v1/completions", {"prompt": "x" * 20_000, "truncate_prompt_tokens": -1, "max_tokens": 1}),
        ("/v1/responses", {"input": [{"role": "user", "content": "z" * 1000}] * 50, "truncation": "auto"}),
    ],
)
async def test_a_prompt_is_charged_for_the_tokens_that_it_comes_to(taught, monkeypatch, path, body):
    charged = []
    admit = taught.app.state.quire.admission.admit

    def seen(*args, **kwargs):
        charged.append(kwargs["prompt_tokens"])
        return admit(*args, **kwargs)

    monkeypatch.setattr(taught.app.state.quire.admission, "admit", seen)
    usage = (await post(taught, path, **body))["usage"]
    used = usage.get("input_tokens", usage.get("prompt_tokens"))
    assert charged == [pytest.approx(used, rel=0.25)]


async def test_questions_about_one_input_are_charged_to_the_quota_before_they_run(serve, fake, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{"name": "alice", "sha256": hashlib.sha256(b"key").hexdigest(), "tpm": 1000}]))
    async with serve(api_keys_file=path) as http:
        body = {"input": INPUT, "questions": [QUESTION] * 40}
        response = await http.post("/v1/decisions", json=body, headers={"authorization": "Bearer key"})
    assert response.status_code == 429
    assert not fake.added


# ---------------------------------------------------------------- what it teaches


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/decisions", {"input": "y" * 2000, "questions": [QUESTION] * 400}),
        ("/v1/completions", {"prompt": "x" * 20_000, "truncate_prompt_tokens": 1, "max_tokens": 1}),
        ("/v1/responses", {"input": [{"role": "user", "content": "z" * 1000}] * 500, "truncation": "auto"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
async def test_nothing_but_text_teaches_how_long_its_tokens_are(taught, path, body):
    before = tokens_of(taught, 2000)
    for _ in range(10):
        await post(taught, path, **body)
    assert tokens_of(taught, 2000) == pytest.approx(before, rel=0.01)


def test_one_long_text_is_not_all_that_is_known(fake):
    experience = Experience(fake.start(lambda message: None))
    for _ in range(200):
        experience.saw_text(Encoded(1000, 250))
    experience.saw_text(Encoded(50_000_000, 1_000_000))  # blanks
    assert experience.prompt_tokens(Asked(prompt_bytes=1000)) == pytest.approx(250, rel=0.2)
    fake.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/decisions", {"input": "y", "questions": [QUESTION] * 400}),
        ("/v1/completions", {"prompt": ["x"] * 400, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "x", "n": 100, "max_tokens": 3}),
    ],
)
async def test_a_limit_does_not_teach_how_long_samples_are(taught, path, body):
    before = usual_sample(taught)
    await post(taught, path, **body)
    assert usual_sample(taught) == before


async def test_an_end_at_the_limit_is_the_limits(taught, fake):
    before = usual_sample(taught)
    fake.answer = lambda request, index: [256]
    for _ in range(20):
        await post(taught, "/v1/completions", prompt="x", max_tokens=1)
    assert usual_sample(taught) == before


async def test_samples_that_end_by_themselves_teach_one_call_at_a_time(taught, fake):
    before = usual_sample(taught)
    fake.answer = lambda request, index: [97, 256]
    await post(taught, "/v1/completions", prompt=["x"] * 400, max_tokens=50)
    assert before - 1 <= usual_sample(taught) <= before
    for _ in range(200):
        await post(taught, "/v1/completions", prompt="x", max_tokens=50)
    assert usual_sample(taught) < before / 2


async def test_without_a_limit_even_the_contexts_end_teaches(taught, fake):
    before = usual_sample(taught)
    fake.answer = lambda request, index: [97] * 5000
    fake.tokens_per_step = 500
    await post(taught, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert usual_sample(taught) > before
