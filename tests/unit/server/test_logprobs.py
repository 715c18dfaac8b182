"""The three shapes of log-probabilities."""

from __future__ import annotations

import math

import msgspec

from quire.scheduler.plan import TokenLogprob
from quire.server.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs


class Tokenizer:
    """id 65 = "A"; ids above 127 are halves of characters and all look alike."""

    def token_bytes(self, token_id):
        return bytes([token_id])

    def token_text(self, token_id):
        return bytes([token_id]).decode("utf-8", "replace")


def test_the_drawn_token_is_among_its_rivals_with_the_same_float():
    drawn = TokenLogprob(67, -0.1 - 2.0, 5, ((65, -0.1), (66, -0.3)))
    answer = completion_logprobs(Tokenizer(), [67], [0], [drawn])
    assert answer["top_logprobs"] == [{"A": -0.1, "B": -0.3, "C": drawn.logprob}]
    assert answer["token_logprobs"][0] == answer["top_logprobs"][0]["C"]


def test_rivals_that_share_a_spelling_keep_the_best():
    drawn = TokenLogprob(200, -3.0, 3, ((201, -1.0), (202, -2.0)))
    assert completion_logprobs(Tokenizer(), [200], [0], [drawn])["top_logprobs"] == [{"\ufffd": -1.0}]


def test_minus_infinity_and_nan_are_json():
    drawn = TokenLogprob(65, -math.inf, 9, ((66, math.nan),))
    answer = completion_logprobs(Tokenizer(), [65], [0], [drawn])
    assert answer["token_logprobs"] == [-9999.0]
    assert answer["top_logprobs"] == [{"A": -9999.0, "B": -9999.0}]
    msgspec.json.encode(answer)


def test_chat_gives_as_many_rivals_as_asked_for():
    drawn = TokenLogprob(200, -1.0, 1, ((200, -1.0), (66, -2.0)))
    for num_top in (0, 1, 2):
        (token,) = chat_logprobs(Tokenizer(), [drawn], num_top)["content"]
        assert len(token["top_logprobs"]) == num_top
        assert (token["token"], token["bytes"]) == ("\ufffd", [200])


def test_prompt_logprobs_start_with_none_and_keep_ranks():
    entries = prompt_logprobs(Tokenizer(), [TokenLogprob(67, -5.0, 40, ((65, -0.1),))])
    assert entries == [
        None,
        {
            "65": {"logprob": -0.1, "rank": 1, "decoded_token": "A"},
            "67": {"logprob": -5.0, "rank": 40, "decoded_token": "C"},
        },
    ]
