"""Structured output: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).

    Grammar ──compile, on a thread──▶ matcher ──a copy for each sample──▶ GrammarState ─ behind a path ─▶ bits [V / 32]

llguidance reads bytes by an Earley parser over lexemes, and computes a mask when it is needed: nothing is prepared per
state. Every phase works within fuel that it is given, so no grammar takes more than some ten milliseconds per mask.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from ..scheduler.params import Grammar
from .errors import RequestError
from .tokenizer import Tokenizer

# llguidance's names of what `Grammar.kind` says.
_FORMATS = {"regex": "regex", "choice": "choice", "lark": "grammar"}
KINDS = ("json_object", "json_schema", *_FORMATS, "structural_tag")

# Between the parts of JSON where a schema does not say ("x-guidance": {"whitespace_pattern": ...}). Not without end: a
# model that has begun to indent may never stop.
_WHITESPACE = r"[ \n\r\t]{0,32}"

MAX_SOURCE_BYTES = 64 * 1024
# Of 30 grammars made to be costly none took over 400 ms to compile or 22 ms for a mask within these, or 30 MB; the
# library's own default for lexer states would allow 500 MB.
_LIMITS = LLParserLimits(max_lexer_states=50_000, max_grammar_size=100_000)
MAX_KEPT = 64  # compiled grammars beside those in use: those of a service's few schemas are compiled once
# Sources of those in use. Compiled, 15 large ones took up to 240 times as much: 2 GB then.
MAX_USED_BYTES = 128 * MAX_SOURCE_BYTES


def definition(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises RequestError for a source that cannot be read."""
    source = grammar.source
    if grammar.kind not in KINDS:
        raise RequestError(f"a grammar's kind is one of {', '.join(KINDS)}, not {grammar.kind!r}", "structured_outputs")
    if len(source.encode("utf-8", "replace")) > MAX_SOURCE_BYTES:
        raise RequestError(f"the grammar is larger than {MAX_SOURCE_BYTES} bytes; simplify it", "structured_outputs")
    try:
        if grammar.kind in ("json_object", "json_schema"):
            schema = source if grammar.kind == "json_schema" else '{"type": "object"}'
            return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})
        if grammar.kind == "structural_tag":
            return _structural_tags(json.loads(source))
        if grammar.kind == "choice" and not json.loads(source):
            raise ValueError("a choice needs at least one text")
        return llguidance.grammar_from(_FORMATS[grammar.kind], source)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise RequestError(f"the grammar cannot be read: {_brief(error)}", "structured_outputs") from None


def _structural_tags(source: dict) -> str:
    """{"structures": [{"begin", "schema", "end"}], "triggers": [...]}: text, and JSON between tags within it."""
    triggers = source["triggers"]
    tags = [
        llguidance.StructTag(
            trigger=next(trigger for trigger in triggers if tag["begin"].startswith(trigger)),
            begin=tag["begin"],
            grammar=tag["schema"],
            end=tag["end"],
        )
        for tag in source["structures"]
    ]
    return llguidance.StructTag.to_grammar(tags, assume_special=False)


class Vocabulary:
    """A tokenizer as llguidance reads it; vocab_size: the width of the logits.

    Making one holds the interpreter, 0.9 s for 150 000 tokens; compiling does not, but for some milliseconds.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.ends = [token for token in tokenizer.eos_token_ids if token < vocab_size]
        if not self.ends:
            raise RequestError(
                "this model names no end token, so no text can be complete; leave structured output out",
                "structured_outputs",
            )
        self.words = -(-vocab_size // 32)
        self._own = LLTokenizer(
            TokenizerWrapper(_Described(tokenizer, vocab_size, self.ends[0])), vocab_size, self.ends
        )

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Raises RequestError for a grammar that is wrong, too complex, or that no text satisfies."""
        matcher = LLMatcher(self._own, definition(grammar), limits=_LIMITS, log_level=0)
        self._check(matcher)
        first = matcher.deep_copy()
        bits = self.mask(first)
        self._check(first)
        if not bits.any():
            raise RequestError("no text satisfies the grammar; relax it", "structured_outputs")
        return matcher

    def _check(self, matcher: LLMatcher) -> None:
        if not matcher.is_error():
            return
        why = _brief(matcher.get_error())
        if why.startswith("NoExtension"):
            raise RequestError("no text satisfies the grammar; relax it", "structured_outputs")
        raise RequestError(f"the grammar is refused: {why}", "structured_outputs")

    def mask(self, matcher: LLMatcher) -> np.ndarray:
        """Of the next token: [ceil(V / 32)] int32, bit i % 32 of word i // 32 for token i. Other threads run on."""
        bits = np.zeros(self.words, np.int32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return bits


class _Described:
    """What TokenizerWrapper asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted(token for token in tokenizer.special_ids if token < vocab_size)
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8"), add_special_tokens=False)


class GrammarState:
    """How far one sample has come in its grammar. drawn: its tokens so far, which the grammar has allowed."""

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher, drawn: Sequence[int] = ()) -> None:
        self._vocabulary, self._matcher = vocabulary, matcher.deep_copy()
        self._masks: dict[tuple[int, ...], np.ndarray] = {}  # by path, until something is drawn
        self._error: str | None = None  # why there can be no more masks
        self.filling: Future[None] | None = None  # of what is being computed on another thread
        for token in drawn:
            self.append(token)

    def append(self, token: int) -> None:
        """It was drawn."""
        self.settle()
        self._masks.clear()
        self._matcher.consume_token(token)

    def mask(self, path: Sequence[int]) -> np.ndarray:
        """Which tokens may follow what was drawn and then `path`, [ceil(V / 32)] int32; none behind a path that the
        grammar forbids. Raises RequestError where the grammar has become too complex."""
        self.settle()
        key = tuple(path)
        if key not in self._masks:
            self.compute([key])
        if self._error is not None:
            raise RequestError(self._error, "structured_outputs")
        return self._masks[key]

    def settle(self) -> None:
        """Wait for masks that are being computed."""
        if self.filling is not None:
            filling, self.filling = self.filling, None
            filling.result()

    def compute(self, paths: Sequence[tuple[int, ...]]) -> None:
        """The masks behind these paths; nobody else may use the state meanwhile."""
        for path in paths:
            self._masks[path] = self._behind(path)
            if self._matcher.is_error():
                self._error = f"the grammar cannot be followed further: {_brief(self._matcher.get_error())}"

    def _behind(self, path: tuple[int, ...]) -> np.ndarray:
        vocabulary, matcher = self._vocabulary, self._matcher
        taken = matcher.try_consume_tokens(list(path)) if path else 0
        mask = vocabulary.mask(matcher) if taken == len(path) else np.zeros(vocabulary.words, np.int32)
        if taken:
            matcher.rollback(taken)
        return mask


@dataclass(slots=True)
class _Used:
    """A grammar that somebody uses: nobody forgets it."""

    compiled: Future[LLMatcher]
    users: int = 0


class Grammars:
    """The grammars of an engine. Its methods may be called from any thread.

    prepare ──▶ in use, by so many ──the last release──▶ kept for the next, the latest MAX_KEPT

    Compiling and masks have a thread each: a step waits for its masks, and never behind a grammar.
    """

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        """load: called once, by `warm` or when the first grammar comes."""
        self._load = load
        self._vocabulary: Vocabulary | None = None
        self._loading = Lock()
        self._used: dict[Grammar, _Used] = {}
        self._used_bytes = 0
        self._kept: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._lock = Lock()  # of these three; nobody computes while it is held
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def warm(self) -> None:
        """Read the vocabulary before anybody is there whom that would hold up. What is wrong with it, the first one who
        wants a grammar is told.
        """
        with suppress(Exception):
            self._loaded()

    def close(self) -> None:
        """What waits to be compiled is dropped; what is being compiled is not waited for."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._filler.shutdown(wait=False, cancel_futures=True)

    def fill(self, states: Sequence[GrammarState], paths: Sequence[Sequence[tuple[int, ...]]]) -> None:
        """Compute on another thread the masks that each state will be asked for; a state waits for them by itself."""

        def compute() -> None:
            for state, some in zip(states, paths, strict=True):
                state.compute(some)

        for state in states:
            state.settle()
        filling = self._filler.submit(compute)
        for state in states:
            state.filling = filling

    def __contains__(self, grammar: Grammar) -> bool:
        """Whether it is compiled."""
        with self._lock:
            used = self._used.get(grammar)
            compiled = self._kept.get(grammar) if used is None else used.compiled
        return compiled is not None and compiled.done() and not _failed(compiled)

    def has_room(self, grammar: Grammar) -> bool:
        """Whether one more may be in use, for the memory that it takes. Who does not ask is not refused."""
        with self._lock:
            return grammar in self._used or self._used_bytes + _size(grammar) <= MAX_USED_BYTES

    def prepare(self, grammar: Grammar) -> Future[LLMatcher]:
        """Compile it on a thread of its own, once for all who ask; the result raises as `Vocabulary.compile` does.

        It stays until it has been released as often as it was prepared.
        """
        compiled, is_new = self._use(grammar)
        if is_new:
            self._compiler.submit(self._compile, grammar, compiled)
        return compiled

    def release(self, grammar: Grammar) -> None:
        """One who prepared it needs it no longer. If it was the last and compiling has not begun, it never will."""
        with self._lock:
            used = self._used[grammar]
            used.users -= 1
            if used.users:
                return
            del self._used[grammar]
            self._used_bytes -= _size(grammar)
            if used.compiled.cancel() or _failed(used.compiled):
                return
            self._kept[grammar] = used.compiled
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)

    def begin(self, grammar: Grammar, drawn: Sequence[int] = ()) -> GrammarState:
        """For one sample; compiles here and now what nobody has prepared, or waits for who does."""
        compiled, is_new = self._use(grammar)
        try:
            if is_new:
                self._compile(grammar, compiled)
            return GrammarState(self._loaded(), compiled.result(), drawn)
        finally:
            self.release(grammar)

    def _use(self, grammar: Grammar) -> tuple[Future[LLMatcher], bool]:
        """Its matcher, now or later, and whether the caller has to see to that."""
        with self._lock:
            used = self._used.get(grammar)
            is_new = False
            if used is None:
                compiled = self._kept.pop(grammar, None)
                is_new = compiled is None or _failed(compiled)
                used = self._used[grammar] = _Used(Future() if compiled is None or is_new else compiled)
                self._used_bytes += _size(grammar)
            used.users += 1
            return used.compiled, is_new

    def _compile(self, grammar: Grammar, compiled: Future[LLMatcher]) -> None:
        if not compiled.set_running_or_notify_cancel():
            return
        try:
            compiled.set_result(self._loaded().compile(grammar))
        except BaseException as error:
            compiled.set_exception(error)

    def _loaded(self) -> Vocabulary:
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            return self._vocabulary


def _size(grammar: Grammar) -> int:
    """Bytes of its source, about; a larger one than may be is refused before anything is made of it."""
    return min(len(grammar.source), MAX_SOURCE_BYTES)


def _failed(compiled: Future[LLMatcher]) -> bool:
    return compiled.done() and (compiled.cancelled() or compiled.exception() is not None)


def _brief(error: object) -> str:
    """The first line of what llguidance says, which may quote the grammar at length."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
