"""/v1/decisions: prompts that end where the answer begins, and probabilities of its letters."""

from __future__ import annotations

import asyncio
import math

import pytest

from quire.scheduler.plan import TokenLogprob

TEAMS = [{"value": "billing"}, {"value": "technical", "description": "faults"}, {"value": True}]
CHOICE = {"type": "choice", "name": "who", "instructions": "Which team?", "choices": TEAMS}
PREDICATE = {"type": "predicate", "instructions": "It is urgent."}
LEVELS = [{"label": "calm"}, {"label": "cross"}]
SCORE = {"type": "score", "name": "mood", "instructions": "How angry?", "levels": LEVELS}
INPUT = "I was charged twice."


def likely(**masses):
    """Log-probabilities that an engine finds: {letter: probability}, and almost nothing for the others."""

    def entry(token_id, params):
        found = {token: masses.get(chr(token), 1e-9) for token in params.logprob_token_ids}
        top = tuple((token, math.log(mass) if mass else -math.inf) for token, mass in found.items())
        return TokenLogprob(token_id, -1.0, 1, top)

    return entry


@pytest.fixture
def decide(http, fake, monkeypatch):
    """What the server makes of questions, with an engine of which only the letters' masses are known."""

    async def post(masses=None, **body):
        if masses is not None:
            entry = likely(**masses)
            plain = fake._advance

            def advance(sample):
                chunk = plain(sample)
                chunk.logprobs = [entry(token, sample.request.params) for token in chunk.token_ids]
                return chunk

            monkeypatch.setattr(fake, "_advance", advance)
        return await http.post("/v1/decisions", json={"input": INPUT, "questions": [PREDICATE], **body})

    return post


async def test_answers_in_the_order_of_the_questions(decide):
    response = await decide({"A": 0.1, "B": 0.3, "C": 0.1}, questions=[CHOICE, PREDICATE, SCORE])
    assert response.status_code == 200, response.text
    answer = response.json()
    choice, predicate, score = answer["answers"]
    assert choice == {
        "type": "choice",
        "name": "who",
        "choice": "technical",
        "confidence": pytest.approx(0.6),
        "probabilities": [
            {"value": "billing", "probability": pytest.approx(0.2)},
            {"value": "technical", "probability": pytest.approx(0.6)},
            {"value": True, "probability": pytest.approx(0.2)},
        ],
    }
    assert predicate == {"type": "predicate", "name": None, "probability": pytest.approx(0.25)}
    assert score["score"] == pytest.approx(0.75)
    assert [(level["label"], level["value"]) for level in score["probabilities"]] == [("calm", 0), ("cross", 1)]
    assert answer["usage"]["output_tokens"] == 3
    assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] + 3


async def test_one_prompt_a_question_with_a_common_beginning(decide, fake):
    await decide(questions=[CHOICE, PREDICATE])
    first, second = (bytes(request.prompt_ids).decode() for request in fake.added)
    assert first == (
        "<user>I was charged twice.\n\nWhich team?\n\nA. billing\nB. technical: faults\nC. true\n\n"
        "Answer with the letter of one option and nothing else.\n<assistant>"
    )
    assert second.startswith("<user>I was charged twice.\n\nIs this true? It is urgent.\n\nA. Yes\nB. No\n")
    params = fake.added[0].params
    assert (params.max_tokens, params.temperature, params.logprobs) == (1, 0.0, 0)
    assert params.logprob_token_ids == (65, 66, 67)


async def test_conversations_and_calls_are_inputs(decide, fake):
    conversation = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_json", "data": {"id": 7}}]},
        {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": '{"id": 7}'},
        {"type": "function_call_output", "call_id": "c1", "output": "paid twice"},
    ]
    response = await decide(input=conversation)
    assert response.status_code == 200, response.text
    text = bytes(fake.added[0].prompt_ids).decode()
    assert '{"id":7}' in text
    assert text.index("look_up") < text.index("paid twice") < text.index("<user>Is this true?")


async def test_a_model_that_would_say_none_of_them_declines(decide):
    response = await decide({"A": 0.0, "B": 0.0})
    assert response.json()["answers"] == [{"type": "refusal", "name": None}]


async def test_one_that_is_aborted_has_no_answers(http, fake, eventually):
    fake.gate.clear()
    body = {"input": INPUT, "questions": [PREDICATE, CHOICE], "request_id": "mine"}
    waiting = asyncio.ensure_future(http.post("/v1/decisions", json=body))
    await eventually(lambda: fake.running == 2)
    await http.post("/abort_requests", json={"request_ids": ["mine"]})
    response = await waiting
    assert response.status_code == 409, response.text
    assert response.json()["error"]["code"] == "request_aborted"
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": "x" * 600}, "input"),
        ({"questions": []}, "questions"),
        ({"questions": [PREDICATE] * 401}, "questions"),
        ({"questions": [{"type": "essay", "instructions": "x"}]}, "questions.0.type"),
        ({"questions": [{"type": "predicate"}]}, "questions.0.instructions"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}]}]}, "questions[0].choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}, {"value": "a"}]}]}, "questions[0].choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": str(i)} for i in range(200)]}]}, "questions[0]"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}, {}]}]}, "questions[0].choices[1]"),
        ({"questions": [{**CHOICE, "choices": [{"value": ""}, {"value": "a"}]}]}, "questions[0].choices[0]"),
        ({"questions": [{**CHOICE, "choices": [{"value": 5}, {"value": "a"}]}]}, "questions[0].choices[0]"),
        ({"questions": [{**SCORE, "levels": [{"label": True}, {"label": "a"}]}]}, "questions[0].levels[0]"),
        (
            {"questions": [{**CHOICE, "choices": [{"value": "a", "description": 5}, {"value": "b"}]}]},
            "questions[0].choices[0].description",
        ),
        ({"questions": [PREDICATE, {**SCORE, "levels": None}]}, "questions[1].levels"),
        ({"tools": [{}]}, "tools"),
        ({"model": "nobody"}, "model"),
    ],
)
async def test_what_is_refused(decide, fake, body, param):
    response = await decide(**body)
    assert response.status_code == (404 if param == "model" else 400), response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert not fake.added


async def test_a_choice_of_a_string_and_of_a_boolean_differ(decide):
    question = {**CHOICE, "choices": [{"value": True}, {"value": "true"}]}
    response = await decide({"A": 0.9, "B": 0.1}, questions=[question])
    assert response.json()["answers"][0]["choice"] is True
