"""Draws the next token of every sequence of a step, each by its own parameters.

    logits ─ greedy ─▶ is the row sound? done, where greedy and unedited
                └────▶ edits of each sequence ─ process_logits ─ sample ─▶ ids ─▶ counted for the next step's penalties

What a sequence asks for lives in one object that enters its slot whole and leaves it whole, and noise comes from the
sequence's seed, its index and the position: neither the slot nor the batch-mates reach a result.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.reference.sampling import Bias, LogitEdits, Logprobs, Marks, Penalties
from ..kernels.registry import Kernels
from ..scheduler.params import SamplingParams
from ..scheduler.plan import RowResult, TokenLogprob
from .errors import RequestError
from .transfer import Download, upload

log = logging.getLogger(__name__)

NAN_LOGITS = "the model produced NaN logits; this is a fault of the model or its weights, not of the request"
NO_TOKEN_LEFT = (
    "no token may be drawn: allowed_token_ids, bad_words and min_tokens together forbid the whole vocabulary; relax one"
)


class RowEdits(NamedTuple):
    """What one sequence changes in its row of logits at this step; None = nothing of the kind."""

    penalised: np.ndarray | None = None  # ids of the tokens it holds
    subtracted: np.ndarray | None = None  # beside `penalised`: presence and frequency
    biased: np.ndarray | None = None  # ids
    bias: np.ndarray | None = None
    banned: np.ndarray | None = None  # ids
    allowed: np.ndarray | None = None  # ids


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

    @property
    def ids(self) -> np.ndarray:
        """[n] int64"""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> np.ndarray:
        """[n] float32: times drawn; 0 = in the prompt only"""
        return self._counts[: len(self._place)]


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
    ) -> None:
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
        self.edited = bool(
            penalised or p.logit_bias or self._allowed is not None or self._ends is not None or p.bad_words
        )

    def edits(self) -> RowEdits:
        p, counts = self.params, self._counts
        banned = self._completions()
        if self._ends is not None and self.num_drawn < p.min_tokens:
            banned = np.concatenate([banned, self._ends])
        penalised = subtracted = None
        if counts is not None:
            penalised = counts.ids
            subtracted = p.frequency_penalty * counts.counts + p.presence_penalty * (counts.counts > 0)
        return RowEdits(penalised, subtracted, self._biased, self._bias, banned if len(banned) else None, self._allowed)

    def _completions(self) -> np.ndarray:
        """The tokens that would complete a bad word, whether it began in the prompt or in the output."""
        tail = tuple(self._tail)
        last = [
            w[-1] for w in self.params.bad_words if len(w) <= len(tail) + 1 and w[:-1] == tail[len(tail) + 1 - len(w) :]
        ]
        return np.array(last, np.int64)

    def append(self, token: int) -> None:
        """What was drawn becomes known: for a sequence that looks back, before its next draw."""
        self._tail.append(token)
        if self._counts is not None:
            self._counts.add(token)


def _checked(values: Iterable[int], field: str, vocab_size: int) -> np.ndarray:
    """Ids as an array. The door has checked them; an id that slipped through would read or write another row."""
    ids = np.array(list(values), np.int64)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise RequestError(f"{field} holds {wrong[0]}; token ids go from 0 to {vocab_size - 1}", field)
    return ids


class Drawn(NamedTuple):
    """What a step draws, under way on the device. ids [L]: always ids, even where a row has an error."""

    states: list[SequenceState]
    ids: Tensor  # [L] int64, on the device
    errors: dict[int, str]  # row -> why nothing was drawn for it
    logprobs: list[list[int]]  # rows that want any, per number of rivals
    download: Download  # ids, largest logit, largest that edits left [L]; the fields of `Logprobs`, list by list


class Rated(NamedTuple):
    """Log-probabilities of given tokens, under way on the device."""

    target_ids: Sequence[int]
    download: Download

    def wait(self) -> list[TokenLogprob]:
        """Row by row. Raises ValueError when a row is not sound: the request cannot be answered, others can."""
        sound, *columns = self.download.wait()
        if not sound:
            raise ValueError(NAN_LOGITS)
        return _listed(torch.tensor(self.target_ids), columns)


class Sampler:
    """The sampling half of the runner: one `SequenceState` per occupied slot.

    vocab_size     the width of the logits
    eos_token_ids  the model's end tokens, masked until a sequence's min_tokens
    """

    def __init__(
        self,
        kernels: Kernels,
        vocab_size: int,
        max_num_seqs: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device | str,
    ) -> None:
        self._kernels = kernels
        self.vocab_size = vocab_size
        # An end token past the logits' width can never be drawn; some model configs name one.
        self._eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        self._device = torch.device(device)
        self._slots: list[SequenceState | None] = [None] * max_num_seqs

    def add(
        self, slot: int, params: SamplingParams, sample_index: int, token_ids: Sequence[int], num_prompt: int
    ) -> None:
        """Fill a slot. token_ids: the prompt, then what was drawn before a preemption.

        Raises RequestError for a token id outside the vocabulary; the slot is then empty.
        """
        self._slots[slot] = None
        self._slots[slot] = SequenceState(
            params, sample_index, token_ids, num_prompt, self._eos_token_ids, self.vocab_size
        )

    def remove(self, slot: int) -> None:
        self._slots[slot] = None

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]) -> list[RowResult]:
        """`draw`, and wait for it."""
        results = [RowResult() for _ in slots]
        self.finish(self.draw(logits, slots, positions), results)
        return results

    def draw(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]) -> Drawn:
        """Draw one token per row; nothing waits for the device.

        logits [L, V] float32, beside slots; positions[i] = the index in its sequence of the token being drawn
        A row that no token can be drawn from will carry an error, and no other row notices.
        """
        states = [self._state(slot) for slot in slots]
        best, ids = self._kernels.greedy.run(logits)
        left = best
        errors: dict[int, str] = {}
        busy = [i for i, state in enumerate(states) if state.edited or state.params.temperature > 0]
        if busy:
            ids, left = self._draw(logits, states, positions, busy, ids, best, errors)
        for state in states:
            state.num_drawn += 1
        wanted: dict[int, list[int]] = {}  # k -> rows
        for row, state in enumerate(states):
            if state.params.logprobs is not None:
                wanted.setdefault(state.params.logprobs, []).append(row)
        found = [self._logprobs(self._select(logits, rows), self._select(ids, rows), k) for k, rows in wanted.items()]
        download = Download([ids, best, left, *(tensor for logprobs in found for tensor in logprobs)])
        return Drawn(states, ids, errors, list(wanted.values()), download)

    def finish(self, drawn: Drawn, results: Sequence[RowResult]) -> None:
        """Wait for what was drawn, one token per row: it goes into its result, and into its sequence's state."""
        ids, best, left, *found = drawn.download.wait()
        rows = zip(drawn.states, results, ids.tolist(), best.tolist(), left.tolist(), strict=True)
        for row, (state, result, token, largest, largest_left) in enumerate(rows):
            if not math.isfinite(largest):
                result.error = NAN_LOGITS
            elif largest_left == -math.inf:
                result.error = NO_TOKEN_LEFT
            else:
                result.error = result.error or drawn.errors.get(row)
            if result.error is None:
                result.token_ids = [token]
                state.append(token)
        width = len(Logprobs._fields)
        for i, rows in enumerate(drawn.logprobs):
            columns = found[i * width : (i + 1) * width]
            for row, logprob in zip(rows, _listed(ids[rows], columns), strict=True):
                if results[row].error is None:
                    results[row].logprobs = [logprob]

    def _state(self, slot: int) -> SequenceState:
        state = self._slots[slot]
        if state is None:
            raise KeyError(f"slot {slot} is empty")
        return state

    def _draw(
        self,
        logits: Tensor,
        states: Sequence[SequenceState],
        positions: Sequence[int],
        busy: list[int],
        ids: Tensor,
        best: Tensor,
        errors: dict[int, str],
    ) -> tuple[Tensor, Tensor]:
        """The greedy ids and largest logits [L] with those of the rows `busy` replaced: drawn from edited logits."""
        edits = {}
        for i in busy:
            try:
                edits[i] = states[i].edits() if states[i].edited else RowEdits()
            except Exception as error:
                log.exception("the logit edits of one sequence failed")
                errors[i] = f"the request cannot be run: {type(error).__name__}"
        rows = list(edits)
        chosen = [states[i] for i in rows]
        numbers = np.array([(s.params.temperature, s.params.top_p, s.params.min_p) for s in chosen], np.float32)
        integers = np.array(
            [(s.params.top_k, s.seed, s.sample_index, positions[i], i) for i, s in zip(rows, chosen, strict=True)],
            np.int64,
        )
        columns = upload([numbers.reshape(-1, 3).T.copy(), integers.reshape(-1, 5).T.copy()], self._device)
        temperature, top_p, min_p = columns[0].unbind()
        top_k, seeds, sample_index, place, index = columns[1].unbind()
        everybody = len(rows) == len(logits)
        x, left = (logits, best) if everybody else (logits[index], best[index])
        if any(state.edited for state in chosen):
            step = self._gather(list(edits.values()), [state.params.repetition_penalty for state in chosen])
            if any(kind is not None for kind in step):
                x = self._kernels.process_logits.run(x, step)
                left, _ = self._kernels.greedy.run(x)
        # Rows without a token to draw give whatever id; `finish` tells what they were.
        drawn = self._kernels.sample.run(x, temperature, top_k, top_p, min_p, seeds, sample_index, place)
        if everybody:
            return drawn, left
        return ids.index_copy(0, index, drawn), best.index_copy(0, index, left)

    def _gather(self, edits: Sequence[RowEdits], repetition: Sequence[float]) -> LogitEdits:
        """The rows' edits as one set of tensors."""
        penalised = self._pairs([e.penalised for e in edits])
        biased = self._pairs([e.biased for e in edits])
        banned = self._pairs([e.banned for e in edits])
        allowed = self._pairs([e.allowed for e in edits])
        return LogitEdits(
            penalties=penalised
            and Penalties(
                *penalised,
                self._tensor(np.array(repetition, np.float32))[penalised[0]],
                self._values([e.subtracted for e in edits]),
            ),
            bias=biased and Bias(*biased, self._values([e.bias for e in edits])),
            banned=banned and Marks(*banned),
            allowed=allowed and Marks(*allowed),
        )

    def _pairs(self, ids: Sequence[np.ndarray | None]) -> tuple[Tensor, Tensor] | None:
        """(rows, columns) of every id; ids[i] belongs to row i."""
        some = [(row, columns) for row, columns in enumerate(ids) if columns is not None]
        if not some:
            return None
        rows = np.repeat([row for row, _ in some], [len(columns) for _, columns in some])
        return self._tensor(rows), self._tensor(np.concatenate([columns for _, columns in some]))

    def _values(self, values: Sequence[np.ndarray | None]) -> Tensor:
        return self._tensor(np.concatenate([v for v in values if v is not None]).astype(np.float32))

    def _select(self, rows_of: Tensor, rows: Sequence[int]) -> Tensor:
        """Some rows of [L, ...], in order."""
        return rows_of if len(rows) == len(rows_of) else rows_of[self._tensor(np.array(rows, np.int64))]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return upload([array], self._device)[0]

    def prompt_logprobs(self, logits: Tensor, target_ids: Sequence[int], k: int) -> list[TokenLogprob]:
        """`rate`, and wait for it."""
        return self.rate(logits, target_ids, k).wait()

    def rate(self, logits: Tensor, target_ids: Sequence[int], k: int) -> Rated:
        """target_ids [n] under logits [n, V] float32, row by row; k = -1 for the whole vocabulary."""
        (targets,) = upload([np.array(target_ids, np.int64)], self._device)
        sound = self._kernels.greedy.run(logits)[0].isfinite().all()
        return Rated(target_ids, Download([sound, *self._logprobs(logits, targets, k)]))

    def _logprobs(self, logits: Tensor, ids: Tensor, k: int) -> Logprobs:
        width = self.vocab_size if k < 0 else min(k, self.vocab_size)
        return self._kernels.token_logprobs.run(logits, ids, width)


def _listed(ids: Tensor, columns: Sequence[Tensor]) -> list[TokenLogprob]:
    """ids [n] with the fields of their `Logprobs`, on the host."""
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(top_ids, top_logprobs, strict=True)))
        for token, logprob, rank, top_ids, top_logprobs in zip(
            ids.tolist(), *(column.tolist() for column in columns), strict=True
        )
    ]
