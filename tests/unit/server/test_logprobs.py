"""The three shapes of log-probabilities."""

from __future__ import annotations

import math

import msgspec

from quire.scheduler.plan import TokenLogprob
from quire.server.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs, speller


class Tokenizer:
    """id 65 = "A"; ids above 127 are halves of characters and all look alike."""

    def token_bytes(self, token_id):
        return bytes([token_id])

    def token_text(self, token_id):
        return bytes([token_id]).decode("utf-8", "replace")


def test_the_drawn_token_is_among_its_rivals_with_the_same_float():
    drawn = TokenLogprob(67, -0.1 - 2.0, 5, ((65, -0.1), (66, -0.3)))
    answer = completion_logprobs(Tokenizer().token_text, [67], [0], [drawn])
    assert answer["top_logprobs"] == [{"A": -0.1, "B": -0.3, "C": drawn.logprob}]
    assert answer["token_logprobs"][0] == answer["top_logprobs"][0]["C"]


def test_rivals_that_share_a_spelling_keep_the_best():
    drawn = TokenLogprob(200, -3.0, 3, ((201, -1.0), (202, -2.0)))
    assert completion_logprobs(Tokenizer().token_text, [200], [0], [drawn])["top_logprobs"] == [{"\ufffd": -1.0}]


def test_minus_infinity_and_nan_are_json():
    drawn = TokenLogprob(65, -math.inf, 9, ((66, math.nan),))
    answer = completion_logprobs(Tokenizer().token_text, [65], [0], [drawn])
    assert answer["token_logprobs"] == [-9999.0]
    assert answer["top_logprobs"] == [{"A": -9999.0, "B": -9999.0}]
    msgspec.json.encode(answer)


def test_chat_lists_all_rivals_with_their_bytes():
    drawn = TokenLogprob(200, -1.0, 1, ((200, -1.0), (66, -2.0)))
    (token,) = chat_logprobs(Tokenizer(), Tokenizer().token_text, [drawn])["content"]
    assert [rival["token"] for rival in token["top_logprobs"]] == ["\ufffd", "B"]
    assert (token["token"], token["bytes"]) == ("\ufffd", [200])


def test_tokens_by_their_ids_have_names_of_their_own():
    spell = speller(Tokenizer(), as_ids=True)
    drawn = TokenLogprob(200, -3.0, 3, ((201, -1.0), (202, -2.0)))
    answer = completion_logprobs(spell, [200], [0], [drawn])
    assert answer["tokens"] == ["token_id:200"]
    assert answer["top_logprobs"] == [{"token_id:201": -1.0, "token_id:202": -2.0, "token_id:200": -3.0}]
    (token,) = chat_logprobs(Tokenizer(), spell, [drawn])["content"]
    assert (token["token"], token["bytes"]) == ("token_id:200", [200])


def test_prompt_logprobs_start_with_none_and_keep_ranks():
    entries = prompt_logprobs(Tokenizer(), [TokenLogprob(67, -5.0, 40, ((65, -0.1),))])
    assert entries == [
        None,
        {
            "65": {"logprob": -0.1, "rank": 1, "decoded_token": "A"},
            "67": {"logprob": -5.0, "rank": 40, "decoded_token": "C"},
        },
    ]
