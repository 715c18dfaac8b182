"""Log-probabilities in the three shapes that clients expect: completions', chat's, and the prompt's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..engine.tokenizer import Tokenizer
from ..scheduler.plan import TokenLogprob

Spell = Callable[[int], str]  # a token's name
FLOOR = -9999.0  # JSON has no -inf; this is what OpenAI's clients know


def speller(tokenizer: Tokenizer, *, as_ids: bool) -> Spell:
    """How tokens are named: by their text, or so that each has a name of its own."""
    return (lambda token_id: f"token_id:{token_id}") if as_ids else tokenizer.token_text


def completion_logprobs(
    spell: Spell, token_ids: Sequence[int], offsets: Sequence[int], logprobs: Sequence[TokenLogprob | None]
) -> dict[str, list[Any]]:
    """/v1/completions: four lists side by side. None is the first prompt token, which nothing predicts.

    The drawn token is always among its own rivals, with the same float: evaluation harnesses call a token greedy if its
    logprob *equals* the largest.
    """
    tops: list[dict[str, float] | None] = []
    for logprob in logprobs:
        if logprob is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for token_id, value in (*logprob.top, (logprob.token_id, logprob.logprob)):
            text = spell(token_id)
            top[text] = max(_finite(value), top.get(text, FLOOR))  # parts of characters may share a spelling
        tops.append(top)
    return {
        "tokens": [spell(token_id) for token_id in token_ids],
        "token_logprobs": [None if logprob is None else _finite(logprob.logprob) for logprob in logprobs],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def chat_logprobs(tokenizer: Tokenizer, spell: Spell, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """/v1/chat/completions: one object per token, with its bytes, since a token need not be whole characters."""
    content = [
        {
            **_token(tokenizer, spell, logprob.token_id, logprob.logprob),
            "top_logprobs": [_token(tokenizer, spell, token_id, value) for token_id, value in logprob.top],
        }
        for logprob in logprobs
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """Per prompt token {id: {logprob, rank, decoded_token}}, None for the first."""
    entries: list[dict[str, Any] | None] = [None]
    for logprob in logprobs:
        entry = {
            str(token_id): {
                "logprob": _finite(value),
                "rank": rank,
                "decoded_token": tokenizer.token_text(token_id),
            }
            for rank, (token_id, value) in enumerate(logprob.top, start=1)
        }
        entry[str(logprob.token_id)] = {
            "logprob": _finite(logprob.logprob),
            "rank": logprob.rank,
            "decoded_token": tokenizer.token_text(logprob.token_id),
        }
        entries.append(entry)
    return entries


def _token(tokenizer: Tokenizer, spell: Spell, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": spell(token_id), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return logprob if logprob > FLOOR else FLOOR
