"""Draws the next token of every sequence of a step, each by its own parameters.

    logits ─ greedy ─▶ is the row sound? done, where greedy and unedited
                └────▶ edits of each sequence ─ process_logits ─ sample ─▶ ids ─▶ counted for the next step's penalties

What a sequence asks for lives in one object (sequence_state.py) that enters its slot whole and leaves it whole, and
noise comes from the sequence's seed, its index and the position: neither the slot nor the batch-mates reach a result.
A row may also stand behind a path of guessed tokens; the same functions treat it as if these had been drawn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.reference.sampling import Bias, LogitEdits, Logprobs, Marks, Masks, Penalties
from ..kernels.registry import Kernels
from ..scheduler.params import SamplingParams
from ..scheduler.plan import RowResult, TokenLogprob
from .errors import RequestError
from .grammar import Grammars
from .sequence_state import RowEdits, SequenceState
from .thinking import ThinkingState
from .transfer import Download, upload

log = logging.getLogger(__name__)

NAN_LOGITS = "the model produced NaN logits; this is a fault of the model or its weights, not of the request"
NO_TOKEN_LEFT = (
    "no token may be drawn: the grammar, allowed_token_ids, bad_words and min_tokens together forbid the whole "
    "vocabulary; relax one"
)


# The filters of each row of logits: temperature, top_k, top_p, min_p, each [R].
Filters = tuple[Tensor, Tensor, Tensor, Tensor]
# Whose log-probabilities stand beside a token's own: so many most likely ones (-1 = all), and these ids.
Rivals = tuple[int, tuple[int, ...]]


class Chosen(NamedTuple):
    """One token per row of logits, on the device: always an id, even where the row has a fault (see `faults`)."""

    ids: Tensor  # [R] int64
    best: Tensor  # [R]: the largest logit
    left: Tensor  # [R]: the largest that the edits left
    errors: dict[int, str]  # row -> why its edits failed


def faults(best: Tensor, left: Tensor, errors: Mapping[int, str]) -> list[str | None]:
    """Why no token can be drawn from a row, or None; the fields of `Chosen`, on the host."""
    return [
        NAN_LOGITS if not math.isfinite(largest) else NO_TOKEN_LEFT if largest_left == -math.inf else errors.get(row)
        for row, (largest, largest_left) in enumerate(zip(best.tolist(), left.tolist(), strict=True))
    ]


class Drawn(NamedTuple):
    """What a step draws, under way on the device. ids [L]: always ids, even where a row has an error."""

    states: list[SequenceState]
    ids: Tensor  # [L] int64, on the device
    errors: dict[int, str]  # row -> why nothing was drawn for it
    logprobs: list[list[int]]  # rows that want any, those with equal rivals together
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
        grammars: Grammars | None = None,
    ) -> None:
        """grammars: for those who ask for one; None = nobody does."""
        self.kernels = kernels
        self.vocab_size = vocab_size
        # An end token past the logits' width can never be drawn; some model configs name one.
        self._eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        self.device = torch.device(device)
        self._slots: list[SequenceState | None] = [None] * max_num_seqs
        self._grammars = grammars

    def add(
        self, slot: int, params: SamplingParams, sample_index: int, token_ids: Sequence[int], num_prompt: int
    ) -> None:
        """Fill a slot. token_ids: the prompt, then what was drawn before a preemption.

        Raises RequestError for a token id outside the vocabulary or a grammar that is none; the slot is then empty.
        """
        self._slots[slot] = None
        grammar = thinking = None
        answer = token_ids[num_prompt:]
        if params.thinking is not None:
            thinking = ThinkingState(params.thinking, constrained=params.grammar is not None)
            answer = thinking.extend(answer)
        if params.grammar is not None and self._grammars is not None:
            grammar = self._grammars.begin(params.grammar, answer)
        self._slots[slot] = SequenceState(
            params, sample_index, token_ids, num_prompt, self._eos_token_ids, self.vocab_size, grammar, thinking
        )

    def remove(self, slot: int) -> None:
        self._slots[slot] = None

    def fill_masks(self, slots: Sequence[int], paths: Sequence[Sequence[tuple[int, ...]]]) -> None:
        """Begin with what grammars allow behind each of these paths, of each slot: while the model computes logits."""
        if self._grammars is None:
            return
        pairs = zip(self.states(slots), paths, strict=True)
        wanted = [(state.grammar, state.answer_paths(some)) for state, some in pairs if state.grammar is not None]
        if wanted:
            self._grammars.fill([state for state, _ in wanted], [some for _, some in wanted])

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
        states = self.states(slots)
        chosen = self.choose(logits, states, [()] * len(states), positions)
        wanted = rows_by_logprobs(states)
        found = [
            self._logprobs(self.select(logits, rows), self.select(chosen.ids, rows), rivals)
            for rivals, rows in wanted.items()
        ]
        download = Download([*chosen[:3], *(tensor for logprobs in found for tensor in logprobs)])
        for state in states:  # last: if anything above raises, each may be drawn again alone
            state.num_drawn += 1
        return Drawn(states, chosen.ids, chosen.errors, list(wanted.values()), download)

    def finish(self, drawn: Drawn, results: Sequence[RowResult]) -> None:
        """Wait for what was drawn, one token per row: it goes into its result, and into its sequence's state."""
        ids, best, left, *found = drawn.download.wait()
        why = faults(best, left, drawn.errors)
        for state, result, token, fault in zip(drawn.states, results, ids.tolist(), why, strict=True):
            result.error = fault or result.error
            if result.error is None:
                try:
                    state.append(token)
                    result.token_ids = [token]
                except Exception as error:
                    log.exception("what one sequence drew cannot be added to its state")
                    result.error = f"the request cannot be run: {type(error).__name__}"
        width = len(Logprobs._fields)
        for i, rows in enumerate(drawn.logprobs):
            columns = found[i * width : (i + 1) * width]
            for row, logprob in zip(rows, _listed(ids[rows], columns), strict=True):
                if results[row].error is None:
                    results[row].logprobs = [logprob]

    def states(self, slots: Sequence[int]) -> list[SequenceState]:
        """Raises KeyError for an empty slot."""
        states = [state for slot in slots if (state := self._slots[slot]) is not None]
        if len(states) < len(slots):
            raise KeyError(f"of the slots {list(slots)}, {len(slots) - len(states)} are empty")
        return states

    def choose(
        self,
        logits: Tensor,
        states: Sequence[SequenceState],
        paths: Sequence[Sequence[int]],
        positions: Sequence[int],
    ) -> Chosen:
        """A token per row of logits [R, V], which stands behind its state's tokens and then those of its path.

        It is the very token that would be drawn there at the position given. Nothing becomes known to the states.
        """
        best, ids = self.kernels.greedy.run(logits)
        busy = [row for row, state in enumerate(states) if state.edited or state.params.temperature > 0]
        if not busy:
            return Chosen(ids, best, best, {})
        some = [states[row] for row in busy]
        filters, (seeds, sample_index, places, index) = self._columns(
            some,
            [state.seed for state in some],
            [state.sample_index for state in some],
            [positions[r] for r in busy],
            busy,
        )
        everybody = len(busy) == len(states)
        x, left = (logits, best) if everybody else (logits[index], best[index])
        x, left, errors = self.edit(x, left, some, [paths[row] for row in busy])
        drawn = self.kernels.sample.run(x, *filters, seeds, sample_index, places)
        errors = {busy[i]: error for i, error in errors.items()}
        if everybody:
            return Chosen(drawn, best, left, errors)
        return Chosen(ids.index_copy(0, index, drawn), best, best.index_copy(0, index, left), errors)

    def edit(
        self, logits: Tensor, best: Tensor, states: Sequence[SequenceState], paths: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, dict[int, str]]:
        """`edited`, the largest logit left in each row [R], and why a row's edits failed; that row stays as it was.

        best [R]: the largest before
        """
        edits: list[RowEdits] = []
        errors: dict[int, str] = {}
        for row, (state, path) in enumerate(zip(states, paths, strict=True)):
            try:
                edits.append(state.edits(path) if state.edited else RowEdits())
            except RequestError as error:
                errors[row] = str(error)
                edits.append(RowEdits())
            except Exception as error:
                log.exception("the logit edits of one sequence failed")
                errors[row] = f"the request cannot be run: {type(error).__name__}"
                edits.append(RowEdits())
        x = self._apply(logits, states, edits)
        return x, best if x is logits else self.kernels.greedy.run(x)[0], errors

    def edited(self, logits: Tensor, states: Sequence[SequenceState], paths: Sequence[Sequence[int]]) -> Tensor:
        """Logits [R, V] with each row's edits behind its path; the tensor itself if nobody edits."""
        edits = [state.edits(path) if state.edited else RowEdits() for state, path in zip(states, paths, strict=True)]
        return self._apply(logits, states, edits)

    def distributions(self, edited: Tensor, states: Sequence[SequenceState]) -> Tensor:
        """What is drawn from in each row of edited logits [R, V]: [R, V] float32, after temperature and filters.

        At temperature 0 all mass lies on the largest, of equals on the lowest id.
        """
        filters, _ = self._columns(states)
        return self.kernels.probabilities.run(edited, *filters)

    def _columns(self, states: Sequence[SequenceState], *integers: Sequence[int]) -> tuple[Filters, Sequence[Tensor]]:
        """The states' filters, and lists of integers beside them, in one copy to the device."""
        given = [state.params for state in states]
        numbers = np.array(
            [[p.temperature for p in given], [p.top_p for p in given], [p.min_p for p in given]], np.float32
        )
        columns = upload([numbers, np.array([[p.top_k for p in given], *integers], np.int64)], self.device)
        temperature, top_p, min_p = columns[0].unbind()
        top_k, *rest = columns[1].unbind()
        return (temperature, top_k, top_p, min_p), rest

    def _apply(self, logits: Tensor, states: Sequence[SequenceState], edits: Sequence[RowEdits]) -> Tensor:
        if not any(state.edited for state in states):
            return logits
        step = self._gather(edits, [state.params.repetition_penalty for state in states])
        return logits if all(kind is None for kind in step) else self.kernels.process_logits.run(logits, step)

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
            masks=self._masks([e.mask for e in edits]),
        )

    def _masks(self, masks: Sequence[np.ndarray | None]) -> Masks | None:
        """masks[i] belongs to row i."""
        some = [(row, bits) for row, bits in enumerate(masks) if bits is not None]
        if not some:
            return None
        rows, bits = upload([np.array([row for row, _ in some]), np.stack([bits for _, bits in some])], self.device)
        return Masks(rows, bits)

    def _pairs(self, ids: Sequence[np.ndarray | None]) -> tuple[Tensor, Tensor] | None:
        """(rows, columns) of every id; ids[i] belongs to row i."""
        some = [(row, columns) for row, columns in enumerate(ids) if columns is not None]
        if not some:
            return None
        rows = np.repeat([row for row, _ in some], [len(columns) for _, columns in some])
        return self._tensor(rows), self._tensor(np.concatenate([columns for _, columns in some]))

    def _values(self, values: Sequence[np.ndarray | None]) -> Tensor:
        return self._tensor(np.concatenate([v for v in values if v is not None]).astype(np.float32))

    def select(self, rows_of: Tensor, rows: Sequence[int]) -> Tensor:
        """Some rows of [L, ...], in order."""
        return rows_of if len(rows) == len(rows_of) else rows_of[self._tensor(np.array(rows, np.int64))]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return upload([array], self.device)[0]

    def rate(self, logits: Tensor, target_ids: Sequence[int], k: int) -> Rated:
        """target_ids [n] under logits [n, V] float32, row by row; k = -1 for the whole vocabulary."""
        (targets,) = upload([np.array(target_ids, np.int64)], self.device)
        sound = self.kernels.greedy.run(logits)[0].isfinite().all()
        return Rated(target_ids, Download([sound, *self._logprobs(logits, targets, (k, ()))]))

    def logprobs(self, logits: Tensor, ids: Sequence[int], rivals: Rivals) -> list[TokenLogprob]:
        """Of ids [n] under logits [n, V], row by row, waited for."""
        (tokens,) = upload([np.array(ids, np.int64)], self.device)
        return _listed(torch.tensor(ids), Download(self._logprobs(logits, tokens, rivals)).wait())

    def _logprobs(self, logits: Tensor, ids: Tensor, rivals: Rivals) -> Logprobs:
        k, named = rivals
        found = self.kernels.token_logprobs.run(logits, ids, self.vocab_size if k < 0 else min(k, self.vocab_size))
        if not named:
            return found
        columns = self._tensor(np.array(named, np.int64))
        own = found.logprob[:, None]
        beside = logits[:, columns] + (own - logits.gather(1, ids[:, None]))
        beside = torch.where(columns == ids[:, None], own, beside)  # of one token, one float
        return found._replace(
            top_ids=torch.cat([found.top_ids, columns.expand(len(ids), -1)], 1),
            top_logprobs=torch.cat([found.top_logprobs, beside], 1),
        )


def rows_by_logprobs(states: Sequence[SequenceState]) -> dict[Rivals, list[int]]:
    """The rows whose sequences want log-probabilities, by the rivals that they want beside them."""
    wanted: dict[Rivals, list[int]] = {}
    for row, state in enumerate(states):
        if state.params.logprobs is not None:
            wanted.setdefault((state.params.logprobs, state.params.logprob_token_ids), []).append(row)
    return wanted


def _listed(ids: Tensor, columns: Sequence[Tensor]) -> list[TokenLogprob]:
    """ids [n] with the fields of their `Logprobs`, on the host. A rival that is there twice is listed once."""
    return [
        TokenLogprob(token, logprob, rank, tuple(dict(zip(top_ids, top_logprobs, strict=True)).items()))
        for token, logprob, rank, top_ids, top_logprobs in zip(
            ids.tolist(), *(column.tolist() for column in columns), strict=True
        )
    ]
