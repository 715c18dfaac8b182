"""Constrained requests among free ones: the same tokens on every path, with and without guesses, whoever is beside."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator

import pytest
from equivalence.paths import combined, drive, engine
from llguidance import LLMatcher

from quire.engine.core import EngineCore
from quire.engine.grammar import Vocabulary
from quire.engine.loader import locate_model
from quire.engine.messages import Abort, AddRequest
from quire.engine.tokenizer import load_tokenizer
from quire.scheduler.params import Grammar, SamplingParams, Slo
from quire.scheduler.plan import Chunk

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


def test_with_room_for_one_grammar_at_a_time(plain, monkeypatch):
    monkeypatch.setattr("quire.engine.grammar.MAX_USED_BYTES", max(len(one.source) for one in GRAMMARS if one))
    assert drive(engine(BUNDLED), [requests()]) == plain


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


class Watched:
    """Which grammars are compiled, and on which threads. One with "slow" in it has to wait until `open` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.compiled: list[str] = []
        self.threads: set[str] = set()
        compile_it = Vocabulary.compile

        def compile_watched(vocabulary: Vocabulary, grammar: Grammar) -> LLMatcher:
            self.compiled.append(grammar.source)
            self.threads.add(threading.current_thread().name.rpartition("_")[0])
            assert "slow" not in grammar.source or self.open.wait(60), "the engine waits for a grammar"
            return compile_it(vocabulary, grammar)

        monkeypatch.setattr(Vocabulary, "compile", compile_watched)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    found = Watched(monkeypatch)
    yield found
    found.open.set()


def one(name: str, source: str, **changes: object) -> AddRequest:
    grammar = Grammar(kind="regex", source=source)
    return AddRequest(name, TOKENIZER.encode("def "), SamplingParams(max_tokens=12, seed=1, grammar=grammar), **changes)


def ends(core: EngineCore, chunks: list[Chunk], count: int) -> dict[str, tuple[str, str | None]]:
    """Of so many samples, `chunks` included, how each ended."""
    found: dict[str, tuple[str, str | None]] = {}
    steps = 0
    while True:
        found |= {c.request_id: (c.finish_reason, c.error) for c in chunks if c.finish_reason is not None}
        if len(found) == count:
            return found
        chunks = core.step()
        steps += 1
        assert steps < 5000


def test_streams_go_on_while_a_grammar_is_compiled(watched):
    core = engine(BUNDLED)
    free = AddRequest("free", TOKENIZER.encode("def "), SamplingParams(max_tokens=12))
    assert drive(core, [[one("r", "[a-z]{9}")]])
    for request in (free, one("known", "[a-z]{9}"), one("slow", "slow[0-9]"), one("behind", "[a-z]{8}")):
        assert core.handle(request) == []
    assert set(ends(core, [], 2)) == {"free", "known"}
    assert not watched.open.is_set()
    watched.open.set()
    assert ends(core, [], 2) == {"slow": ("stop", None), "behind": ("stop", None)}


def test_who_waits_for_a_grammar_ends_when_told_or_out_of_time_and_leaves_nothing(watched, monkeypatch):
    monkeypatch.setattr("quire.engine.grammar.MAX_KEPT", 0)
    core = engine(BUNDLED)
    long_ago = time.monotonic() - 100
    for request in (
        one("first", "slow1"),
        one("left", "slow2"),
        one("timeout", "slow3", arrival=long_ago, timeout=10.0),
        one("deadline", "slow4", arrival=long_ago, slo=Slo(deadline=10.0)),
        one("wrong", "("),
    ):
        assert core.handle(request) == []
    assert ends(core, core.handle(Abort(["left"])), 3) == {
        "left": ("abort", None),
        "timeout": ("expired", "timeout"),
        "deadline": ("expired", "deadline"),
    }
    assert (core.scheduler.counters.aborted, core.scheduler.counters.expired) == (1, 2)
    watched.open.set()
    found = ends(core, [], 2)
    assert found["first"] == ("stop", None)
    assert "is refused" in found["wrong"][1]
    assert watched.compiled == ["slow1", "("]
    assert not core.has_work
    assert Grammar(kind="regex", source="slow1") not in core.grammars, "somebody uses it still"


@pytest.mark.parametrize("names", [("few_slots",), ("few_slots", "lookup"), ("few_slots", "overlap")], ids="+".join)
def test_every_grammar_is_compiled_once_and_never_by_the_loop(watched, monkeypatch, names):
    """More wait than are kept when nobody uses them; some are preempted, and come back."""
    monkeypatch.setattr("quire.engine.grammar.MAX_KEPT", 2)
    sources = [f"[a-z]{{{i}}}[0-9]{{20}}" for i in range(10)]
    asked = [one(f"r{i}", source) for i, source in enumerate(sources)]
    core = engine(BUNDLED, num_blocks=5, block_size=8, max_model_len=32, **combined(names))
    found = drive(core, [asked])
    assert len(found) == len(asked)
    assert core.scheduler.counters.preemptions > 0
    assert watched.compiled == sources
    assert watched.threads == {"grammar"}
    assert sum(request.params.grammar in core.grammars for request in asked) == 2
