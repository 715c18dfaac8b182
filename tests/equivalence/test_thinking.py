"""Thinking with a budget, and grammars behind it: the same tokens on every path, with and without guesses."""

from __future__ import annotations

import re

import pytest
from equivalence.paths import combined, drive, engine

from quire.engine.loader import locate_model
from quire.engine.messages import AddRequest
from quire.engine.thinking import ThinkingState
from quire.engine.tokenizer import load_tokenizer
from quire.scheduler.params import Grammar, SamplingParams, Thinking

BUNDLED = locate_model("bundled")
TOKENIZER = load_tokenizer(BUNDLED)
# The model at hand knows no tags: for these tests its thoughts are comments, of some tokens each.
END = "# done thinking\n"
END_IDS = tuple(TOKENIZER.encode(END, add_special_tokens=False))
START_IDS = tuple(TOKENIZER.encode("# let me think\n", add_special_tokens=False))
GRAMMARS = [None, Grammar(kind="regex", source=r"(self\.[a-z_]{1,12}, ){1,2}None")]
BUDGETS = [0, 1, 5, 12]
DRAWN = [{"temperature": 0.0}, {"seed": 3}, {"seed": 4, "repetition_penalty": 1.1, "logprobs": 1}, {"seed": 5, "n": 2}]


def requests() -> list[AddRequest]:
    made = []
    for i in range(8):
        prompt = TOKENIZER.encode(f"def method_{i % 3}(self, name, mode):\n    ")
        thinking = Thinking(start_ids=START_IDS, end_ids=END_IDS, opened=i != 7, budget=BUDGETS[i % 4])
        grammar = GRAMMARS[(i // 2) % 2]
        params = SamplingParams(max_tokens=48, thinking=thinking, grammar=grammar, **DRAWN[(i + i // 4) % 4])
        made.append(AddRequest(f"r{i}", prompt, params))
    return made


def check(found: dict[tuple[str, int], tuple[list[int], str]]) -> int:
    """The end comes when it is due, and behind it what the grammar says; how many texts of a grammar were complete."""
    complete = 0
    for (name, _), (tokens, reason) in found.items():
        params = requests()[int(name[1:])].params
        thinking = params.thinking
        if not thinking.opened:
            continue
        places = [i for i in range(len(tokens)) if tuple(tokens[i : i + len(END_IDS)]) == END_IDS]
        assert places[:1] == [thinking.budget]  # no model ends its thoughts so by itself
        if params.grammar is not None and reason == "stop":
            complete += 1
            assert re.fullmatch(params.grammar.source, TOKENIZER.decode(tokens[places[0] + len(END_IDS) :]))
    return complete


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, int], tuple[list[int], str]]:
    found = drive(engine(BUNDLED), [requests()])
    assert check(found) >= 2
    return found


@pytest.mark.parametrize(
    "names",
    [("few_slots", "odd_chunks"), ("scarce_blocks",), ("overlap",), ("lookup",), ("lookup_trees", "few_slots")],
    ids="+".join,
)
def test_every_path(plain, names):
    assert drive(engine(BUNDLED, **combined(names)), [requests()]) == plain


def test_alone(plain):
    for request in requests():
        alone = drive(engine(BUNDLED), [[request]])
        assert alone == {name: said for name, said in plain.items() if name[0] == request.request_id}


def test_guesses_of_a_model(plain):
    """Those that guess with chances draw others, which keep to budgets and grammars all the same."""
    guessing = {"speculative_method": "draft", "speculative_model": "bundled", "speculative_tree": "rsd-s:2x3"}
    core = engine(BUNDLED, **guessing, speculative_adaptive=False)
    found = drive(core, [requests()])
    assert check(found) >= 2
    greedy = [name for name in plain if requests()[int(name[0][1:])].params.temperature == 0]
    assert {name: found[name] for name in greedy} == {name: plain[name] for name in greedy}
    assert core.scheduler.counters.accepted > 10


def test_a_planted_fault_is_caught(monkeypatch):
    """Were guesses not counted as thoughts, this suite would say so."""
    real = ThinkingState.after
    monkeypatch.setattr(ThinkingState, "after", lambda self, path: real(self, ()))
    guessing = {"speculative_method": "draft", "speculative_model": "bundled"}
    free = [request for request in requests() if request.params.grammar is None]
    found = drive(engine(BUNDLED, **guessing, speculative_adaptive=False), [free])
    with pytest.raises(AssertionError):
        check(found)
