"""Which guesses become tokens: the target's logits at every node of every tree, judged.

    logits of all nodes ─ no q ─▶ a token for each node ─ match ──▶ path ─▶ the path's tokens, and one more
                        └─ q ───▶ p of each node ─ verify ────────▶ path ─┘

Edits, filters and noise of a node are those that it would meet if its path had been drawn one by one. So `match` gives
the very tokens of a run without guesses, and `verify` tokens of the same distribution (kernels/reference/verify.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.reference.verify import match
from ...scheduler.plan import RowResult, TokenLogprob
from ..sampler import Sampler, faults, rows_by_logprobs
from ..sequence_state import SequenceState
from ..transfer import Download, upload
from .proposer import Draft

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """What became of one draft; path: the accepted nodes, from the root down."""

    result: RowResult
    path: list[int]


class _Case(NamedTuple):
    """One draft before its judge. Of its rows, row 0 is the root's and row i + 1 that of node i."""

    state: SequenceState
    draft: Draft
    position: int  # of the token after the root
    first: int  # its first row among all logits
    depths: list[int]  # of its rows

    @property
    def rows(self) -> int:
        return len(self.depths)

    def paths(self) -> list[tuple[int, ...]]:
        """The guessed tokens that each row stands behind; left out where nothing depends on them."""
        if not self.state.edited:
            return [()] * self.rows
        return [self.draft.tree.path(row - 1) for row in range(self.rows)]


class _Walk(NamedTuple):
    """How far a case came."""

    path: list[int]  # accepted nodes
    tokens: list[int]  # theirs, and the one behind them
    error: str | None  # why no token can be drawn from the first row

    @property
    def rows(self) -> list[int]:
        """Of the case: token i of the step was drawn from row i of these."""
        return [0, *(node + 1 for node in self.path)]


def judge(
    sampler: Sampler, logits: Tensor, slots: Sequence[int], positions: Sequence[int], drafts: Sequence[Draft]
) -> list[Verdict]:
    """Accept or reject the drafts of some sequences, draw the token that follows each, and tell their states.

    logits     [R, V] float32: 1 + nodes rows for each sequence, one sequence after another, its root first
    positions  of each sequence, the index in it of the token after the root
    A row that no token can be drawn from ends its sequence if it is the first, and else the path; nobody else notices.
    Whatever it raises, no state knows of anything new by then, and the sequences can be judged again, each alone.
    Raises ValueError for a q beside temperature 0: what is guessed then has no distribution, and the draft must say so.
    """
    cases: list[_Case] = []
    first = 0
    for state, position, draft in zip(sampler.states(slots), positions, drafts, strict=True):
        if draft.q is not None and state.params.temperature == 0:
            raise ValueError("a draft for temperature 0 has a q; leave it None, which asks for the rule of `match`")
        cases.append(_Case(state, draft, position, first, [0, *draft.tree.depths()]))
        first += cases[-1].rows
    walks: dict[int, _Walk] = {}
    matched = [i for i, case in enumerate(cases) if case.draft.q is None]
    verified = [i for i, case in enumerate(cases) if case.draft.q is not None]
    for rule, indices in ((_match, matched), (_verify, verified)):
        if indices:
            mine = [cases[i] for i in indices]
            rows = [row for case in mine for row in range(case.first, case.first + case.rows)]
            walks |= zip(indices, rule(sampler, sampler.select(logits, rows), mine), strict=True)
    in_order = [walks[i] for i in range(len(cases))]
    logprobs = _logprobs(sampler, logits, cases, in_order)
    return [_conclude(*one) for one in zip(cases, in_order, logprobs, strict=True)]


def _match(sampler: Sampler, logits: Tensor, cases: Sequence[_Case]) -> list[_Walk]:
    """The target draws at every node; the walk goes where it draws a guess. logits: the rows of the cases alone."""
    states, paths = _states_and_paths(cases)
    positions = [case.position + depth for case in cases for depth in case.depths]
    chosen = sampler.choose(logits, states, paths, positions)
    ids, best, left = Download(chosen[:3]).wait()
    why = faults(best, left, chosen.errors)
    # A row at fault has drawn nothing, so no guess is behind it.
    draws = [token if fault is None else -1 for token, fault in zip(ids.tolist(), why, strict=True)]
    walks, first = [], 0
    for case in cases:
        drawn = draws[first : first + case.rows]
        path = match(drawn, *case.draft.tree)
        walks.append(_walk(case, path, drawn[path[-1] + 1 if path else 0], why[first : first + case.rows]))
        first += case.rows
    return walks


def _verify(sampler: Sampler, logits: Tensor, cases: Sequence[_Case]) -> list[_Walk]:
    """Rejection sampling of all trees in lockstep, the shorter ones padded. logits: the rows of the cases alone."""
    states, paths = _states_and_paths(cases)
    best, _ = sampler.kernels.greedy.run(logits)
    x, left, errors = sampler.edit(logits, best, states, paths)
    counts = np.array([case.rows for case in cases])
    width = int(counts.max())
    tokens = np.zeros((len(cases), width), np.int64)
    parents = np.full((len(cases), width), -1, np.int64)
    for i, case in enumerate(cases):
        tokens[i, 1 : case.rows] = case.draft.tree.tokens
        parents[i, 1 : case.rows] = np.array(case.draft.tree.parents, np.int64) + 1
    sources = np.array([(c.state.seed, c.state.sample_index, c.position) for c in cases], np.int64).T.copy()
    trees = upload([tokens, parents, sources], sampler.device)
    p = _padded(sampler.distributions(x, states), counts)
    q = _padded(torch.cat([case.draft.q for case in cases if case.draft.q is not None]), counts)
    accepted, last = sampler.kernels.verify.run(p, q, *trees[:2], *trees[2].unbind())
    accepted, last, best, left = Download([accepted, last, best, left]).wait()
    why = faults(best, left, errors)
    walks, first = [], 0
    for case, taken, token in zip(cases, accepted.tolist(), last.tolist(), strict=True):
        path = [row - 1 for row, kept in enumerate(taken) if kept]
        walks.append(_walk(case, path, token, why[first : first + case.rows]))
        first += case.rows
    return walks


def _states_and_paths(cases: Sequence[_Case]) -> tuple[list[SequenceState], list[tuple[int, ...]]]:
    """Of each row of the cases."""
    return [case.state for case in cases for _ in case.depths], [path for case in cases for path in case.paths()]


def _padded(rows: Tensor, counts: np.ndarray) -> Tensor:
    """Trees of counts[i] rows, one after another [R, V], as [B, N, V]. What pads is never read: any row will do."""
    trees, width = len(counts), int(counts.max())
    if len(rows) == trees * width:
        return rows.view(trees, width, -1)
    places = (np.cumsum(counts) - counts)[:, None] + np.minimum(np.arange(width), counts[:, None] - 1)
    (index,) = upload([places.reshape(-1)], rows.device)
    return rows.index_select(0, index).view(trees, width, -1)


def _walk(case: _Case, path: list[int], last: int, why: Sequence[str | None]) -> _Walk:
    """The walk as far as there is no fault on the way; why: the faults of the case's rows.

    Behind accepted guesses a fault is left to the step that begins there: by then the sequence may have ended.
    """
    guessed = [case.draft.tree.tokens[node] for node in path]
    for i, node in enumerate(path):
        if why[0] is None and why[node + 1] is not None:
            return _Walk(path[:i], guessed[: i + 1], None)
    return _Walk(path, [*guessed, last], why[0])


def _logprobs(
    sampler: Sampler, logits: Tensor, cases: Sequence[_Case], walks: Sequence[_Walk]
) -> list[list[TokenLogprob] | None]:
    """Of the tokens that come out of each case, by the model's own logits in the rows that they were drawn from."""
    found: list[list[TokenLogprob] | None] = [None] * len(cases)
    for rivals, wanting in rows_by_logprobs([case.state for case in cases]).items():
        sound = [i for i in wanting if walks[i].error is None]
        rows = [cases[i].first + row for i in sound for row in walks[i].rows]
        ids = [token for i in sound for token in walks[i].tokens]
        if rows:
            listed = iter(sampler.logprobs(sampler.select(logits, rows), ids, rivals))
            for i in sound:
                found[i] = [next(listed) for _ in walks[i].tokens]
    return found


def _conclude(case: _Case, walk: _Walk, logprobs: list[TokenLogprob] | None) -> Verdict:
    """The verdict; the tokens that come out become known to the sequence."""
    result = RowResult(drafted=case.rows - 1, draft_depth=max(case.depths), error=walk.error)
    if walk.error is None:
        try:
            case.state.num_drawn += len(walk.tokens)
            for token in walk.tokens:
                case.state.append(token)
            result.token_ids, result.logprobs = walk.tokens, logprobs
        except Exception as error:
            log.exception("what one sequence drew cannot be added to its state")
            result.error = f"the request cannot be run: {type(error).__name__}"
    return Verdict(result, walk.path)
