"""What one sequence asks of its logits, and what it has drawn as far as that depends on it.

params + tokens so far (+ a guessed path) ─ edits ─▶ RowEdits: what changes in its next row of logits
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..scheduler.params import SamplingParams
from .errors import RequestError
from .grammar import GrammarState
from .thinking import ThinkingState


class RowEdits(NamedTuple):
    """What one sequence changes in its row of logits at this step; None = nothing of the kind."""

    penalised: np.ndarray | None = None  # ids of the tokens it holds
    subtracted: np.ndarray | None = None  # beside `penalised`: presence and frequency
    biased: np.ndarray | None = None  # ids
    bias: np.ndarray | None = None
    banned: np.ndarray | None = None  # ids
    allowed: np.ndarray | None = None  # ids
    mask: np.ndarray | None = (
        None  # of the whole vocabulary: [ceil(V / 32)] int32, bit i % 32 of word i // 32 = i stays
    )


class TokenCounts:
    """The distinct tokens of one sequence, and how often each was drawn: grows with them, not the vocabulary."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self._place = {token: i for i, token in enumerate(distinct)}
        self._ids = np.fromiter(distinct, np.int64, len(distinct))
        self._counts = np.zeros(len(distinct), np.float32)
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            room = np.zeros(max(64, place), np.int64)
            self._ids = np.concatenate([self._ids, room])
            self._counts = np.concatenate([self._counts, room.astype(np.float32)])
        self._ids[place] = token
        self._counts[place] += 1

    def after(self, path: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """ids [n] int64 and counts [n] float32 as if `path` had been drawn too; 0 = in the prompt only."""
        known = len(self._place)
        ids, counts = self._ids[:known], self._counts[:known]
        if not path:
            return ids, counts
        new = dict.fromkeys(token for token in path if token not in self._place)
        places = {token: known + i for i, token in enumerate(new)}
        ids = np.concatenate([ids, np.fromiter(new, np.int64, len(new))])
        counts = np.concatenate([counts, np.zeros(len(new), np.float32)])
        for token in path:
            counts[places[token] if token in places else self._place[token]] += 1
        return ids, counts


class SequenceState:
    """One sequence's parameters, and what it has drawn as far as they depend on it."""

    def __init__(
        self,
        params: SamplingParams,
        sample_index: int,
        token_ids: Sequence[int],
        num_prompt: int,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        grammar: GrammarState | None = None,
        thinking: ThinkingState | None = None,
    ) -> None:
        """grammar, thinking: how far these tokens have come in those of `params`."""

        def ids(values: Iterable[int], field: str) -> np.ndarray:
            return _checked(values, field, vocab_size)

        p = self.params = params
        self.sample_index = sample_index
        self.seed = (p.seed + 2**63) % 2**64 - 2**63  # 64 bits in two's complement
        self.num_drawn = len(token_ids) - num_prompt  # known or not

        penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        ids(token_ids if penalised else (), "prompt")
        self._counts = TokenCounts(token_ids[:num_prompt], token_ids[num_prompt:]) if penalised else None
        self._biased = ids(p.logit_bias, "logit_bias") if p.logit_bias else None
        self._bias = np.fromiter(p.logit_bias.values(), np.float32) if p.logit_bias else None
        self._allowed = None
        if p.allowed_token_ids is not None:
            self._allowed = ids(p.allowed_token_ids, "allowed_token_ids")
            if not len(self._allowed):
                raise RequestError(
                    "allowed_token_ids is empty; name at least one token id, or leave it out", "allowed_token_ids"
                )
        self._ends = ids((*eos_token_ids, *p.stop_token_ids), "stop_token_ids") if p.min_tokens > 0 else None
        for word in p.bad_words:
            ids(word, "bad_words")
        self._tail = deque(token_ids, maxlen=max((len(word) for word in p.bad_words), default=1) - 1)
        self.grammar = grammar
        self.thinking = thinking
        self._eos = ids(eos_token_ids, "eos_token_id") if p.thinking is not None and p.grammar is not None else None
        if p.thinking is not None:
            ids((*p.thinking.start_ids, *p.thinking.end_ids), "thinking_token_budget")
        self.edited = bool(
            penalised
            or p.logit_bias
            or self._allowed is not None
            or self._ends is not None
            or p.bad_words
            or grammar
            or thinking
        )

    def edits(self, path: Sequence[int] = ()) -> RowEdits:
        """Of the logits behind all that is known and then `path`, guessed tokens that count as if they were drawn."""
        p = self.params
        outlook = None if self.thinking is None else self.thinking.after(path)
        if outlook is not None and outlook.forced is not None:
            return RowEdits(allowed=np.array([outlook.forced], np.int64))
        mask = self._mask(path if outlook is None else outlook.answer)
        if mask is not None and outlook is not None and outlook.opens and p.thinking is not None:
            mask = _with(mask, p.thinking.start_ids[0])
        banned = self._completions(path)
        if self._ends is not None and self.num_drawn + len(path) < p.min_tokens and not _only(mask, self._ends):
            banned = np.concatenate([banned, self._ends])
        if self._eos is not None and outlook is not None and outlook.answer is None:
            banned = np.concatenate([banned, self._eos])  # an answer is owed yet
        penalised = subtracted = None
        if self._counts is not None:
            penalised, counts = self._counts.after(path)
            subtracted = p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        banned = banned if len(banned) else None
        return RowEdits(penalised, subtracted, self._biased, self._bias, banned, self._allowed, mask)

    def answer_paths(self, paths: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
        """Of each path that ends in the answer, what of it the grammar is to follow."""
        if self.thinking is None:
            return [tuple(path) for path in paths]
        outlooks = [self.thinking.after(path) for path in paths]
        return [outlook.answer for outlook in outlooks if outlook.answer is not None]

    def _mask(self, answer: Sequence[int] | None) -> np.ndarray | None:
        """What the grammar allows; answer: the part of the path that it is to follow, None = it has not begun."""
        return None if self.grammar is None or answer is None else self.grammar.mask(answer)

    def _completions(self, path: Sequence[int]) -> np.ndarray:
        """The tokens that would complete a bad word, wherever it began: in the prompt, the output or the path."""
        tail = (*self._tail, *path)
        last = [
            w[-1] for w in self.params.bad_words if len(w) <= len(tail) + 1 and w[:-1] == tail[len(tail) + 1 - len(w) :]
        ]
        return np.array(last, np.int64)

    def append(self, token: int) -> None:
        """What was drawn becomes known: for a sequence that looks back, before its next draw."""
        self._tail.append(token)
        if self._counts is not None:
            self._counts.add(token)
        answer = (token,) if self.thinking is None else self.thinking.append(token)
        if self.grammar is not None:
            for part in answer:
                self.grammar.append(part)


def _with(mask: np.ndarray, token: int) -> np.ndarray:
    """The mask with one more id."""
    bits = mask.view(np.uint32).copy()
    bits[token // 32] |= np.uint32(1 << token % 32)
    return bits.view(np.int32)


def _only(mask: np.ndarray | None, ids: np.ndarray) -> bool:
    """Whether a mask leaves none but these: a text that is complete has to end, however short it is."""
    if mask is None:
        return False
    rest = mask.view(np.uint32).copy()
    for token in ids.tolist():
        rest[token // 32] &= ~np.uint32(1 << token % 32)
    return not rest.any()


def _checked(values: Iterable[int], field: str, vocab_size: int) -> np.ndarray:
    """Ids as an array. The door has checked them; an id that slipped through would read or write another row."""
    ids = np.array(list(values), np.int64)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise RequestError(f"{field} holds {wrong[0]}; token ids go from 0 to {vocab_size - 1}", field)
    return ids
