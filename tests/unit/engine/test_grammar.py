"""Grammars: what they allow is what they say, behind any path, and costly or broken ones end one request."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from quire.engine.compiling import Compiling
from quire.engine.errors import RequestError
from quire.engine.grammar import MAX_KEPT, MAX_SOURCE_BYTES, Grammars, GrammarState, Vocabulary
from quire.engine.loader import locate_model
from quire.engine.messages import AddRequest
from quire.engine.tokenizer import load_tokenizer
from quire.scheduler.params import Grammar, SamplingParams

TOKENIZER = load_tokenizer(locate_model("bundled"))
VOCABULARY = Vocabulary(TOKENIZER, 4096)
EOS = TOKENIZER.eos_token_ids[0]


def regex(source: str) -> Grammar:
    return Grammar(kind="regex", source=source)


def begin(grammar: Grammar, drawn=()) -> GrammarState:
    return GrammarState(VOCABULARY, VOCABULARY.compile(grammar), drawn)


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


def test_only_so_many_grammars_are_kept():
    grammars = Grammars(lambda: VOCABULARY)
    for i in range(MAX_KEPT + 5):
        grammars.begin(regex(f"a{{{i + 1}}}"))
    assert sum(regex(f"a{{{i + 1}}}") in grammars for i in range(MAX_KEPT + 5)) == MAX_KEPT


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

        compiling = Compiling(Slow(lambda: VOCABULARY))
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
        compiling = Compiling(grammars)
        assert not compiling.hold(AddRequest("a", [1], SamplingParams(max_tokens=1)))
        assert not compiling.hold(self.request("b"))

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
