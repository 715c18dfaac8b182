"""Which guesses become tokens: the target's logits at every node of every tree, judged.

    logits of all nodes ─ no q ─▶ a token for each node ─ match ──▶ path ─▶ the path's tokens, and one more
                        └─ q ───▶ p of each node ─ verify ────────▶ path ─┘

Edits, filters and noise of a node are those that it would meet if its path had been drawn one by one. So `match` gives
the very tokens of a run without guesses, and `verify` tokens of the same distribution (kernels/reference/verify.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.reference.verify import match
from ...scheduler.plan import RowResult
from ..sampler import Sampler, faults, rows_by_logprobs
from ..sequence_state import SequenceState
from ..transfer import Download, upload
from .proposer import Draft


class Verdict(NamedTuple):
    """What became of one draft; path: the accepted nodes, from the root down."""

    result: RowResult
    path: list[int]


@dataclass(slots=True)
class _Case:
    """One draft before its judges. Row 0 of its rows is the root's, row i + 1 that of node i."""

    state: SequenceState
    draft: Draft
    position: int  # of the token after the root
    first: int  # its first row among all logits
    depths: list[int]  # of its rows
    path: list[int]
    last: int  # the token behind the path
    faults: list[str | None]  # of its rows

    @property
    def rows(self) -> int:
        return len(self.depths)

    def paths(self) -> list[tuple[int, ...]]:
        """The guessed tokens that each row stands behind; left out where nothing depends on them."""
        if not self.state.edited:
            return [()] * self.rows
        return [self.draft.tree.path(row - 1) for row in range(self.rows)]

    @property
    def walked(self) -> list[int]:
        """The rows on the path: token i of the step was drawn from row i of these."""
        return [0, *(node + 1 for node in self.path)]

    @property
    def tokens(self) -> list[int]:
        return [*(self.draft.tree.tokens[node] for node in self.path), self.last]


def judge(
    sampler: Sampler, logits: Tensor, slots: Sequence[int], positions: Sequence[int], drafts: Sequence[Draft]
) -> list[Verdict]:
    """Accept or reject the drafts of some sequences, draw the token that follows each, and tell their states.

    logits     [R, V] float32: 1 + nodes rows for each sequence, one after another, its root first
    positions  of each sequence, the index in it of the token after the root
    A row that no token can be drawn from ends its sequence if the path leads there; nobody else notices.
    Raises ValueError for a q beside temperature 0: such guesses have no distribution, and the draft has to say so.
    """
    cases, first = [], 0
    for state, position, draft in zip(sampler.states(slots), positions, drafts, strict=True):
        if draft.q is not None and state.params.temperature == 0:
            raise ValueError(
                "a draft for a sequence of temperature 0 has a q; it must be None, for the rule of `match`"
            )
        cases.append(_Case(state, draft, position, first, [0, *draft.tree.depths()], [], -1, []))
        first += cases[-1].rows
    matched = [case for case in cases if case.draft.q is None]
    if matched:
        _match(sampler, _rows_of(sampler, logits, matched), matched)
    verified = [case for case in cases if case.draft.q is not None]
    if verified:
        _verify(sampler, _rows_of(sampler, logits, verified), verified)
    verdicts = [_conclude(case) for case in cases]
    _add_logprobs(sampler, logits, cases, verdicts)
    return verdicts


def _rows_of(sampler: Sampler, logits: Tensor, cases: Sequence[_Case]) -> Tensor:
    return sampler.select(logits, [row for case in cases for row in range(case.first, case.first + case.rows)])


def _states_and_paths(cases: Sequence[_Case]) -> tuple[list[SequenceState], list[tuple[int, ...]]]:
    """Of each row of the cases."""
    return [case.state for case in cases for _ in case.depths], [path for case in cases for path in case.paths()]


def _match(sampler: Sampler, logits: Tensor, cases: Sequence[_Case]) -> None:
    """The target draws at every node; the walk goes where it draws a guess."""
    positions = [case.position + depth for case in cases for depth in case.depths]
    chosen = sampler.choose(logits, *_states_and_paths(cases), positions)
    ids, best, left = Download(chosen[:3]).wait()
    _share_faults(cases, faults(best, left, chosen.errors))
    first, draws = 0, ids.tolist()
    for case in cases:
        # A row at fault has drawn nothing, so no guess is behind it.
        drawn = [
            -1 if fault else token for token, fault in zip(draws[first : first + case.rows], case.faults, strict=True)
        ]
        case.path = match(drawn, *case.draft.tree)
        case.last = drawn[case.walked[-1]]
        first += case.rows


def _verify(sampler: Sampler, logits: Tensor, cases: Sequence[_Case]) -> None:
    """Rejection sampling of all trees in lockstep, the shorter ones padded."""
    states, paths = _states_and_paths(cases)
    best, _ = sampler.kernels.greedy.run(logits)
    x, left, errors = sampler.edit(logits, best, states, paths)
    width = max(case.rows for case in cases)
    tokens = np.zeros((len(cases), width), np.int64)
    parents = np.full((len(cases), width), -1, np.int64)
    for i, case in enumerate(cases):
        tokens[i, 1 : case.rows] = case.draft.tree.tokens
        parents[i, 1 : case.rows] = case.draft.tree.parents
        parents[i, 1 : case.rows] += 1
    noise = [[c.state.seed for c in cases], [c.state.sample_index for c in cases], [c.position for c in cases]]
    *tree, sources = upload([tokens, parents, np.array(noise, np.int64)], sampler.device)
    p = _padded(sampler, sampler.distributions(x, states), cases, width)
    q = _padded(sampler, _joined(case.draft.q for case in cases if case.draft.q is not None), cases, width)
    accepted, last, best, left = Download(
        [*sampler.kernels.verify.run(p, q, *tree, *sources.unbind()), best, left]
    ).wait()
    _share_faults(cases, faults(best, left, errors))
    for case, taken, token in zip(cases, accepted.tolist(), last.tolist(), strict=True):
        case.path = [row - 1 for row, kept in enumerate(taken) if kept]
        case.last = token


def _joined(rows: Iterable[Tensor]) -> Tensor:
    parts = list(rows)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _padded(sampler: Sampler, rows: Tensor, cases: Sequence[_Case], width: int) -> Tensor:
    """The cases' rows [R, V] as [B, width, V]; what pads a shorter tree is never read, and any row will do."""
    if len(rows) == len(cases) * width:
        return rows.view(len(cases), width, -1)
    starts = np.cumsum([0, *(case.rows for case in cases[:-1])])
    ends = starts + [case.rows - 1 for case in cases]
    places = np.minimum(starts[:, None] + np.arange(width), ends[:, None])
    (index,) = upload([places.reshape(-1)], sampler.device)
    return rows.index_select(0, index).view(len(cases), width, -1)


def _share_faults(cases: Sequence[_Case], faults: Sequence[str | None]) -> None:
    first = 0
    for case in cases:
        case.faults = list(faults[first : first + case.rows])
        first += case.rows


def _conclude(case: _Case) -> Verdict:
    """A case's verdict; its tokens become known to its sequence."""
    result = RowResult(drafted=case.rows - 1, draft_depth=max(case.depths))
    result.error = next((fault for row in case.walked if (fault := case.faults[row])), None)
    if result.error is None:
        result.token_ids = case.tokens
        case.state.num_drawn += len(result.token_ids)
        for token in result.token_ids:
            case.state.append(token)
    return Verdict(result, case.path)


def _add_logprobs(sampler: Sampler, logits: Tensor, cases: Sequence[_Case], verdicts: Sequence[Verdict]) -> None:
    """Those of the tokens that came out, by the model's own logits in the rows that they were drawn from."""
    for k, wanting in rows_by_logprobs([case.state for case in cases]).items():
        sound = [i for i in wanting if verdicts[i].result.error is None]
        rows = [cases[i].first + row for i in sound for row in cases[i].walked]
        ids = [token for i in sound for token in cases[i].tokens]
        if not rows:
            continue
        found = iter(sampler.logprobs(sampler.select(logits, rows), ids, k))
        for i in sound:
            verdicts[i].result.logprobs = [next(found) for _ in cases[i].tokens]
