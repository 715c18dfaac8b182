"""Grammars: what they allow is what they say, behind any path, and costly or broken ones end one request."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher

from quire.engine.compiling import Compiling
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.errors import RequestError
from quire.engine.grammar import MAX_KEPT, MAX_SOURCE_BYTES, Grammars, GrammarState, Vocabulary
from quire.engine.loader import locate_model
from quire.engine.messages import AddRequest
from quire.engine.ranks import Ranks
from quire.engine.tokenizer import load_tokenizer
from quire.scheduler.params import Grammar, SamplingParams, Slo

TOKENIZER = load_tokenizer(locate_model("bundled"))
VOCABULARY = Vocabulary(TOKENIZER, 4096)
EOS = TOKENIZER.eos_token_ids[0]


def regex(source: str) -> Grammar:
    return Grammar(kind="regex", source=source)


COMPILE = Vocabulary.compile


def begin(grammar: Grammar, drawn=()) -> GrammarState:
    return GrammarState(VOCABULARY, COMPILE(VOCABULARY, grammar), drawn)


def allowed(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_a_mask_holds_the_tokens_that_some_text_goes_on_with():
    """Against all tokens tried one by one; the language is finite, so that its prefixes can be listed."""
    words = [f"{a}{b}{c}" for a in ("ab", "c", "été") for b in ("", "-", "--") for c in ("0", "12", "123")]
    state = begin(Grammar(kind="choice", source=json.dumps(words, ensure_ascii=False)))
    text = b""
    for token in (*TOKENIZER.encode("ét", add_special_tokens=False), *TOKENIZER.encode("é-")):
        here = {
            i
            for i in range(4096)
            if i not in TOKENIZER.special_ids
            and (piece := TOKENIZER.token_bytes(i))
            and any(word.encode().startswith(text + piece) for word in words)
        }
        assert here
        assert allowed(state.mask(())) == here
        state.append(token)
        text += TOKENIZER.token_bytes(token)
    for token in TOKENIZER.encode("12"):
        state.append(token)
    assert EOS in allowed(state.mask(()))  # complete, though a 3 may follow


def test_behind_a_path_as_behind_what_was_drawn():
    path = TOKENIZER.encode("deadbeef")
    one, other = begin(regex("[a-f]{6,10}!")), begin(regex("[a-f]{6,10}!"))
    for i in range(len(path)):
        assert (one.mask(tuple(path[: i + 1])) == (other.append(path[i]) or other.mask(()))).all()
    resumed = begin(regex("[a-f]{6,10}!"), path)
    assert (resumed.mask(()) == other.mask(())).all()


def test_behind_a_path_that_is_forbidden_nothing_is_allowed_and_the_state_is_as_before():
    state = begin(regex("[a-f]{6}"))
    before = state.mask(()).copy()
    wrong = TOKENIZER.encode("ab1")
    assert not allowed(state.mask(tuple(wrong)))
    assert (begin(regex("[a-f]{6}")).mask(()) == before).all()
    state.append(TOKENIZER.encode("a")[0])
    assert allowed(state.mask(()))


def test_behind_an_end_there_is_another_at_most():
    """Guesses may end in one; the step then ends with it."""
    state = begin(Grammar(kind="choice", source='["ab", "abc"]'), TOKENIZER.encode("ab"))
    for end in TOKENIZER.eos_token_ids:
        assert end in allowed(state.mask(()))
        assert allowed(state.mask((end,))) <= set(TOKENIZER.eos_token_ids)


def test_masks_that_were_begun_on_another_thread_are_the_same():
    grammars = Grammars(lambda: VOCABULARY)
    state = grammars.begin(regex("[a-f]{6}"))
    paths = [(), tuple(TOKENIZER.encode("ab")), tuple(TOKENIZER.encode("x"))]
    grammars.fill([state], [paths])
    plain = begin(regex("[a-f]{6}"))
    for path in paths:
        assert (state.mask(path) == plain.mask(path)).all()


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (regex("["), "is refused"),
        (regex("(" * 5000 + "a" + ")" * 5000), "is refused"),
        (Grammar(kind="json_schema", source="{"), "cannot be read"),
        (Grammar(kind="json_schema", source='{"type": "strange"}'), "is refused"),
        (Grammar(kind="json_schema", source='{"$ref": "#"}'), "no text satisfies"),
        (Grammar(kind="json_schema", source='{"a":' * 400 + "{}" + "}" * 400), "cannot be read"),
        (Grammar(kind="choice", source="[]"), "at least one"),
        (Grammar(kind="choice", source="3"), "cannot be read"),
        (Grammar(kind="lark", source="%%%"), "cannot be read"),
        (Grammar(kind="lark", source="start: nobody"), "is refused"),
        (Grammar(kind="structural_tag", source='{"structures": []}'), "cannot be read"),
        (Grammar(kind="poem"), "kind is one of"),
        (regex("a" * (MAX_SOURCE_BYTES + 1)), "larger than"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_reason(grammar: Grammar, says: str):
    with pytest.raises(RequestError, match=says) as error:
        VOCABULARY.compile(grammar)
    assert error.value.param == "structured_outputs"
    assert len(str(error.value)) < 300


COSTLY = [
    regex("(a+)+b"),
    regex("(a|aa)+$"),
    regex("((a{1,100}){1,100}){1,100}"),
    regex("(x+x+)+y"),
    regex(".*[01].{25}"),
    regex("(?i)" + "(é|ü|ß)" * 2000),
    Grammar(kind="lark", source='start: start start | "a"'),
    Grammar(kind="lark", source="start: " + " | ".join(f'"{i}"' for i in range(6000))),
    Grammar(kind="json_schema", source='{"type": "array", "minItems": 100000000, "items": {"type": "integer"}}'),
    Grammar(kind="json_schema", source=json.dumps({"enum": ["x" * 100 + str(i) for i in range(500)]})),
]


@pytest.mark.parametrize("grammar", COSTLY, ids=lambda grammar: grammar.source[:20])
def test_costly_grammars_are_followed_or_given_up_but_never_hang(grammar: Grammar):
    """The library's fuel is the bound; a minute is far above it on any machine."""
    started = time.monotonic()
    try:
        state = begin(grammar)
        for _ in range(60):
            choice = sorted(allowed(state.mask(())))
            if not choice or EOS in choice:
                break
            state.append(choice[len(choice) // 2])
    except RequestError as error:
        given_up = str(error)
    else:
        given_up = ""
    assert re.match("the grammar (cannot be followed further|is refused)|$", given_up)
    assert time.monotonic() - started < 60


def test_a_grammar_that_has_become_too_complex_says_so_at_every_mask():
    state = begin(regex("((a{1,100}){1,100}){1,100}"))

    def go_on() -> None:
        for _ in range(200):
            state.append(max(allowed(state.mask(())) - set(TOKENIZER.eos_token_ids)))

    with pytest.raises(RequestError, match="cannot be followed further"):
        go_on()
    with pytest.raises(RequestError, match="cannot be followed further"):
        state.mask(())


def test_a_model_without_an_end_token_has_no_structured_output(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TOKENIZER, "eos_token_ids", [])
    with pytest.raises(RequestError, match="names no end token"):
        Vocabulary(TOKENIZER, 4096)


def test_logits_that_are_wider_than_the_tokenizer():
    wide = Vocabulary(TOKENIZER, 4101)
    state = GrammarState(wide, wide.compile(regex("(.|\n)*")))
    mask = state.mask(())
    assert mask.shape == (129,)
    assert max(allowed(mask)) < 4096


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.open.set()


class Gate:
    """While it is not open, no grammar is compiled to its end. compiled: those that were begun, and by which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.compiled: list[tuple[Grammar, str]] = []

        def compile_later(vocabulary: Vocabulary, grammar: Grammar) -> LLMatcher:
            self.compiled.append((grammar, threading.current_thread().name))
            self.reached.set()
            assert self.open.wait(60), "whoever opens the gate waits behind it"
            return COMPILE(vocabulary, grammar)

        monkeypatch.setattr(Vocabulary, "compile", compile_later)

    @property
    def sources(self) -> list[str]:
        return [grammar.source for grammar, _ in self.compiled]


def test_masks_do_not_wait_for_grammars_that_are_being_compiled(gate: Gate):
    state = begin(regex("[a-f]{6}"))
    grammars = Grammars(lambda: VOCABULARY)
    compiled = grammars.prepare(regex("a"))
    gate.reached.wait(60)
    grammars.fill([state], [[()]])
    assert state.filling is not None
    state.filling.result(30)
    assert allowed(state.mask(()))
    assert not compiled.done()


def test_what_is_prepared_is_compiled_once_for_all_and_kept_while_it_is_in_use(gate: Gate):
    gate.open.set()
    grammars = Grammars(lambda: VOCABULARY)
    some = [regex(f"a{{{i + 1}}}") for i in range(MAX_KEPT + 5)]
    for grammar in (*some, *some):
        grammars.prepare(grammar).result(60)
    for grammar in some:
        assert grammar in grammars
        grammars.begin(grammar)
    assert gate.sources == [grammar.source for grammar in some]
    assert {thread for _, thread in gate.compiled} == {"grammar_0"}
    for grammar in some:
        grammars.release(grammar)
    assert all(grammar in grammars for grammar in some), "each was prepared twice"
    for grammar in some:
        grammars.release(grammar)
    assert [grammar in grammars for grammar in some] == [False] * 5 + [True] * MAX_KEPT


def test_what_nobody_needs_any_more_is_not_compiled(gate: Gate):
    grammars = Grammars(lambda: VOCABULARY)
    grammars.prepare(regex("first"))
    gate.reached.wait(60)
    grammars.prepare(regex("left"))
    grammars.prepare(regex("shared"))
    shared = grammars.prepare(regex("shared"))
    grammars.release(regex("left"))
    grammars.release(regex("shared"))
    grammars.release(regex("first"))  # is being compiled, and will be kept
    gate.open.set()
    shared.result(60)
    assert gate.sources == ["first", "shared"]
    assert regex("first") in grammars
    assert grammars.prepare(regex("left")).result(60)


def test_who_begins_waits_for_one_that_is_being_prepared(gate: Gate):
    grammars = Grammars(lambda: VOCABULARY)
    grammars.prepare(regex("a"))
    with ThreadPoolExecutor(2) as pool:
        states = [pool.submit(grammars.begin, regex("a")) for _ in range(2)]
        gate.open.set()
        assert all(allowed(state.result(60).mask(())) for state in states)
    assert gate.sources == ["a"]


def test_what_cannot_be_compiled_is_tried_again():
    attempts = []

    def load() -> Vocabulary:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("no tokenizer yet")
        return VOCABULARY

    grammars = Grammars(load)
    with pytest.raises(OSError, match="yet"):
        grammars.prepare(regex("a")).result(60)
    assert regex("a") not in grammars
    with pytest.raises(OSError, match="yet"):
        grammars.begin(regex("a"))  # in use still: the answer is the same for all
    grammars.release(regex("a"))
    assert allowed(grammars.begin(regex("a")).mask(()))


def test_a_vocabulary_is_read_once_and_before_anybody_asks():
    read = []

    def load() -> Vocabulary:
        read.append(1)
        return VOCABULARY

    grammars = Grammars(load)
    grammars.warm()
    assert read == [1]
    assert allowed(grammars.begin(regex("a")).mask(()))
    assert read == [1]


def test_a_vocabulary_that_cannot_be_read_disturbs_only_who_wants_a_grammar():
    def load() -> Vocabulary:
        raise RequestError("this model names no end token", "structured_outputs")

    grammars = Grammars(load)
    grammars.warm()
    with pytest.raises(RequestError, match="no end token"):
        grammars.begin(regex("a"))


def test_an_engine_reads_its_vocabulary_when_it_starts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    read = []

    def counted(*given) -> Vocabulary:
        read.append(given)
        return Vocabulary(*given)

    monkeypatch.setattr("quire.engine.assemble.Vocabulary", counted)
    core = EngineCore(EngineConfig(model=str(tiny_model), dtype="float32", threads=1, max_model_len=96))
    assert len(read) == 1
    assert "read vocabulary" in core.ready.startup_seconds
    core.close()


def test_closing_waits_for_nothing_and_leaves_no_thread(gate: Gate):
    grammars = Grammars(lambda: VOCABULARY)
    for i in range(5):
        grammars.prepare(regex(f"a{{{i + 1}}}"))
    grammars.fill([begin(regex("a"))], [[()]])
    gate.reached.wait(60)
    threads = {*grammars._compiler._threads, *grammars._filler._threads}
    assert len(threads) == 2
    grammars.close()
    gate.open.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert gate.sources == ["a{1}"]


def test_only_so_many_grammars_are_kept():
    grammars = Grammars(lambda: VOCABULARY)
    for i in range(MAX_KEPT + 5):
        grammars.begin(regex(f"a{{{i + 1}}}"))
    assert sum(regex(f"a{{{i + 1}}}") in grammars for i in range(MAX_KEPT + 5)) == MAX_KEPT


class Told(Ranks):
    """What other ranks are told of grammars."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, str]] = []

    def prepare(self, grammar: Grammar) -> None:
        self.orders.append(("prepare", grammar.source))

    def release(self, grammar: Grammar) -> None:
        self.orders.append(("release", grammar.source))


class TestCompiling:
    def request(self, name: str, source: str = "a", n: int = 1) -> AddRequest:
        return AddRequest(name, [1], SamplingParams(max_tokens=3, n=n, grammar=regex(source)))

    def held(self, *requests: AddRequest) -> tuple[Compiling, list[Future]]:
        """Nothing is compiled until its future is set."""
        futures: list[Future] = []

        class Slow(Grammars):
            def prepare(self, grammar: Grammar) -> Future:
                futures.append(Future())
                return futures[-1]

        compiling = Compiling(Slow(lambda: VOCABULARY), Told())
        assert all(compiling.hold(request) for request in requests)
        return compiling, futures

    def test_who_is_ready_leaves_and_others_wait_on(self):
        compiling, futures = self.held(self.request("a"), self.request("b"), self.request("c"))
        futures[1].set_result(None)
        futures[2].set_exception(RequestError("no"))
        assert [(one.message.request_id, one.error) for one in compiling.ready()] == [("b", None), ("c", "no")]
        assert len(compiling) == 1
        compiling.wait(0.001)
        assert not list(compiling.ready())

    def test_aborts(self):
        compiling, futures = self.held(self.request("a", n=2), self.request("b", n=2))
        assert compiling.abort("x", None) is None
        assert [(chunk.index, chunk.finish_reason) for chunk in compiling.abort("a", None) or ()] == [
            (0, "abort"),
            (1, "abort"),
        ]
        assert compiling.abort("b", 1) == []
        futures[0].set_result(None)
        futures[1].set_result(None)
        assert [(one.message.request_id, one.aborted) for one in compiling.ready()] == [("b", [1])]

    def test_who_asks_for_none_or_for_one_that_is_known_need_not_wait(self):
        grammars = Grammars(lambda: VOCABULARY)
        grammars.begin(regex("a"))
        compiling = Compiling(grammars, Told())
        assert not compiling.hold(AddRequest("a", [1], SamplingParams(max_tokens=1)))
        assert not compiling.hold(self.request("b"))

    def test_who_runs_out_of_time_ends_by_the_limit_that_came_first(self):
        late = [
            msgspec.structs.replace(self.request("timeout", n=2), arrival=100.0, timeout=5.0, slo=Slo(deadline=6.0)),
            msgspec.structs.replace(self.request("deadline"), arrival=100.0, timeout=6.0, slo=Slo(deadline=5.0)),
            msgspec.structs.replace(self.request("later"), arrival=101.0, timeout=5.0),
            self.request("never"),
        ]
        compiling, _ = self.held(*late)
        assert compiling.expire(104.9) == []
        assert [(c.request_id, c.index, c.finish_reason, c.error) for c in compiling.expire(105.0)] == [
            ("timeout", 0, "expired", "timeout"),
            ("timeout", 1, "expired", "timeout"),
            ("deadline", 0, "expired", "deadline"),
        ]
        assert len(compiling) == 2

    def test_a_grammar_is_in_use_on_every_rank_until_its_request_has_ended(self):
        told, grammars = Told(), Grammars(lambda: VOCABULARY)
        compiling = Compiling(grammars, told)
        assert compiling.hold(self.request("a", "x"))
        compiling.wait(60)
        assert [one.error for one in compiling.ready()] == [None]
        assert not compiling.hold(self.request("b", "x"))
        assert not compiling.hold(self.request("b", "y")), "its id is in use"
        compiling.release("a")
        assert told.orders == [("prepare", "x"), ("prepare", "x"), ("release", "x")]
        compiling.release("b")
        compiling.release("b")
        compiling.release("unknown")
        assert told.orders[3:] == [("release", "x")]

    def test_there_is_room_for_so_many_and_who_comes_first_has_it_first(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("quire.engine.grammar.MAX_USED_BYTES", 5)
        told, grammars = Told(), Grammars(lambda: VOCABULARY)
        grammars.begin(regex("known"))
        compiling = Compiling(grammars, told)
        compile, may_compile = VOCABULARY.compile, threading.Event()
        monkeypatch.setattr(VOCABULARY, "compile", lambda grammar: may_compile.wait(60) and compile(grammar))
        for name, source in (("a", "xxx"), ("b", "yyyy"), ("c", "z"), ("again", "xxx")):
            assert compiling.hold(self.request(name, source))
        may_compile.set()
        assert not compiling.hold(self.request("d", "known"))
        assert told.orders == [("prepare", "xxx"), ("prepare", "known")]
        compiling.release("d")
        compiling.wait(60)
        assert [one.message.request_id for one in compiling.ready()] == ["a"]
        compiling.wait(60)  # for nobody
        assert not list(compiling.ready())
        assert not compiling.hold(self.request("e", "xxx")), "it is compiled"
        compiling.release("e")
        compiling.release("a")
        del told.orders[:]
        assert not list(compiling.ready())
        assert told.orders == [("prepare", "yyyy"), ("prepare", "z")]
        for name in ("b", "c"):
            assert compiling.abort(name, None)
            compiling.release(name)
        assert [one.message.request_id for one in compiling.ready()] == ["again"]

    def test_a_source_that_is_too_large_waits_for_no_room(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("quire.engine.grammar.MAX_USED_BYTES", MAX_SOURCE_BYTES)
        compiling = Compiling(Grammars(lambda: VOCABULARY), Told())
        assert compiling.hold(self.request("a", "a" * (MAX_SOURCE_BYTES + 1)))
        compiling.wait(60)
        (one,) = compiling.ready()
        assert "larger than" in one.error

    def test_a_fault_of_ours_tells_no_details(self, caplog: pytest.LogCaptureFixture):
        compiling, futures = self.held(self.request("a"))
        futures[0].set_exception(OSError("/secret/path"))
        (one,) = compiling.ready()
        assert one.error == "the request cannot be run: OSError"
        assert "cannot be compiled" in caplog.text


def test_texts_of_every_kind_are_what_was_asked_for(tmp_path: Path):
    from quire import LLM

    person = {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}
    schema = {"type": "object", "properties": person, "required": list(person), "additionalProperties": False}
    schema["x-guidance"] = {"whitespace_pattern": ""}
    kinds = {
        "json_schema": json.dumps(schema),
        "regex": r"[a-f]{3}-\d{2,4}",
        "choice": '["yes", "no", "maybé"]',
        "lark": 'start: "def " NAME "():"\nNAME: /[a-z_]{1,8}/',
    }

    def check(kind: str, text: str) -> None:
        if kind == "json_schema":
            found = json.loads(text)
            assert set(found) == {"name", "age"}
            assert 0 <= found["age"] <= 150
        elif kind == "regex":
            assert re.fullmatch(kinds["regex"], text)
        elif kind == "choice":
            assert text in json.loads(kinds["choice"])
        else:
            assert re.fullmatch(r"def [a-z_]{1,8}\(\):", text)

    llm = LLM(max_model_len=256, threads=1)
    try:
        for kind, source in kinds.items():
            for temperature, n in ((0.0, 1), (1.0, 3)):
                params = SamplingParams(
                    max_tokens=60,
                    temperature=temperature,
                    n=n,
                    seed=3,
                    logprobs=1,
                    grammar=Grammar(kind=kind, source=source),
                )
                (answer,) = llm.generate("def main():\n    ", params, progress=False)
                for output in answer.outputs:
                    assert output.finish_reason == "stop"
                    check(kind, output.text)
        with pytest.raises(RequestError, match="is refused"):
            llm.generate("a", SamplingParams(max_tokens=5, grammar=regex("(")), progress=False)
        # A text that is complete ends, whatever min_tokens asks for.
        short = SamplingParams(max_tokens=9, min_tokens=5, temperature=0.0, grammar=regex("ab"))
        (answer,) = llm.generate("a", short, progress=False)
        assert (answer.outputs[0].text, answer.outputs[0].finish_reason) == ("ab", "stop")
        assert answer.outputs[0].token_ids.count(EOS) == 1
        assert len(answer.outputs[0].token_ids) == len(TOKENIZER.encode("ab")) + 1
    finally:
        llm.close()
