"""Constrained requests among free ones: the same tokens on every path, with and without guesses, whoever is beside."""

from __future__ import annotations

import json
import re

import pytest
from equivalence.paths import combined, drive, engine

from quire.engine.loader import locate_model
from quire.engine.messages import AddRequest
from quire.engine.tokenizer import load_tokenizer
from quire.scheduler.params import Grammar, SamplingParams

BUNDLED = locate_model("bundled")
TOKENIZER = load_tokenizer(BUNDLED)
CALL = {
    "type": "object",
    "properties": {"name": {"enum": ["open", "close"]}, "mode": {"type": "string", "maxLength": 6}},
    "required": ["name", "mode"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": " ?"},
}
GRAMMARS = [
    Grammar(kind="json_schema", source=json.dumps(CALL)),
    Grammar(kind="regex", source=r"(self\.[a-z_]{1,12}, ){2,4}None"),
    None,
    Grammar(kind="choice", source='["return None", "return self", "raise ValueError"]'),
]
DRAWN = [
    {"temperature": 0.0},
    {"seed": 3},
    {"seed": 4, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "logprobs": 2},
    {"seed": 5, "n": 2, "min_tokens": 2},
]


def requests() -> list[AddRequest]:
    made = []
    for i in range(8):
        prompt = TOKENIZER.encode(f"def method_{i % 3}(self, name, mode):\n    ")
        params = SamplingParams(max_tokens=24, grammar=GRAMMARS[i % 4], **DRAWN[(i + i // 4) % 4])
        made.append(AddRequest(f"r{i}", prompt, params))
    return made


def check_texts(found: dict[tuple[str, int], tuple[list[int], str]]) -> None:
    """What ended is what its grammar says."""
    ended = 0
    for (name, _), (tokens, reason) in found.items():
        grammar = GRAMMARS[int(name[1:]) % 4]
        if grammar is None or reason != "stop":
            continue
        ended += 1
        text = TOKENIZER.decode(tokens)
        if grammar.kind == "regex":
            assert re.fullmatch(grammar.source, text)
        else:
            assert (
                text in json.loads(grammar.source)
                if grammar.kind == "choice"
                else set(json.loads(text)) == {"name", "mode"}
            )
    assert ended >= 5


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, int], tuple[list[int], str]]:
    found = drive(engine(BUNDLED), [requests()])
    check_texts(found)
    return found


@pytest.mark.parametrize(
    "names",
    [
        ("few_tokens",),
        ("few_slots", "odd_chunks"),
        ("scarce_blocks",),
        ("overlap",),
        ("no_cache", "equal_time"),
        ("lookup",),
        ("lookup_trees", "scarce_blocks"),
        ("lookup", "overlap", "few_slots"),
    ],
    ids="+".join,
)
def test_every_path(plain, names):
    assert drive(engine(BUNDLED, **combined(names)), [requests()]) == plain


def test_alone(plain):
    for request in requests():
        alone = drive(engine(BUNDLED), [[request]])
        assert alone == {name: said for name, said in plain.items() if name[0] == request.request_id}


@pytest.mark.parametrize("tree", ["chain:4", "rsd-s:2x3"])
@pytest.mark.parametrize("method", ["draft", "layers"])
def test_model_drafts(plain, method, tree):
    """Greedy ones say the same; drawn ones keep to their grammars."""
    model = {"draft": "bundled", "layers": "0,1"}[method]
    guessing = {"speculative_method": method, "speculative_model": model, "speculative_tree": tree}
    core = engine(BUNDLED, **guessing, speculative_adaptive=False)
    found = drive(core, [requests()])
    check_texts(found)
    greedy = [name for name in plain if requests()[int(name[0][1:])].params.temperature == 0]
    assert greedy
    assert {name: found[name] for name in greedy} == {name: plain[name] for name in greedy}
    assert core.scheduler.counters.accepted > 10
