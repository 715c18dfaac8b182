"""Requests of every kind, at random from a seed: what a server gets in a day, in any order."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..client import CHAT, COMPLETIONS
from ..dataset import POOL_TEXT

WORDS = POOL_TEXT.split()
LONG_WORDS = 700  # about 1,000 tokens: several steps of prefill
MAX_TOKENS = 48
# One draft model, one slot in the queue and a few grammars: what is compiled once is kept, and no leak.
GRAMMARS: tuple[dict[str, Any], ...] = (
    {"structured_outputs": {"regex": "[a-z]{3,30}( [a-z]{3,30}){8,20}"}},
    {"structured_outputs": {"choice": ["alpha beta gamma", "alpha beta delta", "omega"]}},
    {"response_format": {"type": "json_object"}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "point",
                "schema": {
                    "type": "object",
                    "properties": {"x": {"type": "integer"}, "label": {"type": "string", "maxLength": 60}},
                    "required": ["x", "label"],
                    "additionalProperties": False,
                },
            },
        }
    },
)


@dataclass(frozen=True, slots=True)
class Ask:
    path: str
    body: dict[str, Any]


def _prompt(rng: random.Random) -> str:
    count = rng.randint(1, 40) if rng.random() < 0.85 else rng.randint(40, LONG_WORDS)
    return " ".join(rng.choices(WORDS, k=count))


def _sampling(rng: random.Random) -> dict[str, Any]:
    kinds: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"temperature": 0},
        lambda: {"temperature": 1.0, "seed": rng.randrange(1 << 30)},
        lambda: {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        lambda: {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
        lambda: {"temperature": 0, "logit_bias": {"7": 2.0, "9": -3.0}},
        lambda: {"temperature": 1.0, "stop": ["\n\n", "return"], "min_p": 0.02},
    )
    return rng.choice(kinds)()


def any_request(rng: random.Random, *, speculation: tuple[str, ...] = ()) -> Ask:
    """Any that a server started with these methods of speculation takes."""
    body: dict[str, Any] = {"max_tokens": rng.randint(1, MAX_TOKENS), "stream": rng.random() < 0.6, **_sampling(rng)}
    if rng.random() < 0.2:
        body |= {"n": rng.choice((2, 3, 4)), "temperature": 1.0}  # greedy samples would be equal: that is refused
    if rng.random() < 0.2:
        body |= rng.choice(GRAMMARS)
    else:
        body["ignore_eos"] = rng.random() < 0.7
    if speculation:
        body["speculative"] = {"method": rng.choice(speculation)}
    chat = rng.random() < 0.4
    if rng.random() < 0.15:
        body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    if chat:
        return Ask(CHAT, body | {"messages": [{"role": "user", "content": _prompt(rng)}]})
    return Ask(COMPLETIONS, body | {"prompt": _prompt(rng)})
