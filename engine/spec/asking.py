"""Asks a proposer, and believes nothing: what it raises or makes up costs one request its guesses, and no more."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...scheduler.plan import DraftPass
from ..transfer import upload
from .proposer import Draft, Proposer, View

log = logging.getLogger(__name__)

# A row of float32 probabilities adds up to 1 within this, whatever its length.
ROUNDING = 1e-3


class Answer(NamedTuple):
    """What is guessed for one sequence, or why its proposer is not to be asked again."""

    draft: Draft | None = None
    error: str | None = None


def ask(proposer: Proposer, views: Sequence[View], vocab_size: int) -> tuple[list[Answer], list[DraftPass]]:
    """An answer for each view. If the proposer fails for all of them together, each is asked for alone.

    What failing took is told as well: it is time of the step, and not of the target.
    """
    started = time.perf_counter()
    try:
        given, taken = proposer.propose(views)
        drafts = list(given)
        for view, draft in zip(views, drafts, strict=True):
            if draft is not None:
                check(draft, view, vocab_size)
        _check_chances([draft for draft in drafts if draft is not None])
        _check_pass(taken, proposer.method)
    except Exception as error:
        failed = DraftPass(proposer.method, 0, 0, time.perf_counter() - started)
        log.exception("the proposer %r failed for %d sequences", proposer.method, len(views))
        if len(views) == 1:
            return [Answer(error=f"{type(error).__name__}: {error}")], [failed]
        alone = [ask(proposer, [view], vocab_size) for view in views]
        return [answers[0] for answers, _ in alone], [failed, *(taken for _, passes in alone for taken in passes)]
    return [Answer(draft if draft is not None and draft.tree.tokens else None) for draft in drafts], [taken]


def check(draft: Draft, view: View, vocab_size: int) -> None:
    """Raise an error for a draft that is not what was ordered, or could not be verified."""
    tokens, parents = draft.tree
    if len(tokens) > view.shape.nodes:
        raise ValueError(f"{len(tokens)} tokens were guessed where {view.shape.nodes} were asked for")
    if len(parents) != len(tokens) or not all(
        type(parent) is int and -1 <= parent < node for node, parent in enumerate(parents)
    ):
        raise ValueError(f"the parents of {len(tokens)} guesses are {parents}: each must precede its children")
    if max(draft.tree.depths(), default=0) > view.shape.depth:
        raise ValueError(f"guesses are {max(draft.tree.depths())} deep where {view.shape.depth} were asked for")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"token {token!r} was guessed; ids are whole numbers from 0 to {vocab_size - 1}")
    if len(set(zip(parents, tokens, strict=True))) < len(tokens):
        raise ValueError(f"of the guesses {tokens} behind {parents} two are the same")
    q = draft.q
    if q is not None and (q.shape != (len(tokens) + 1, vocab_size) or q.dtype != torch.float32):
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype} for {len(tokens)} guesses over {vocab_size} tokens")
    if q is not None and view.state.params.temperature == 0:
        raise ValueError("a greedy request is given guesses with a distribution")


def _check_chances(drafts: Sequence[Draft]) -> None:
    """Raise ValueError if a guess cannot have been drawn from its q. One copy from the device for all drafts."""
    places: list[int] = []
    counts: list[int] = []
    qs: list[Tensor] = []
    for (tokens, parents), q in drafts:
        if q is not None and tokens:
            places += [(parent + 1) * q.shape[1] + token for token, parent in zip(tokens, parents, strict=True)]
            counts.append(len(tokens))
            qs.append(q)
    if not qs:
        return
    (index,) = upload([np.array(places, np.int64)], qs[0].device)
    chances = torch.cat([q.take(part) for q, part in zip(qs, index.split(counts), strict=True)]).tolist()
    for chance in chances:
        if not 0 < chance <= 1 + ROUNDING:
            raise ValueError(f"a token was guessed with probability {chance}: q is not what it was drawn from")


def _check_pass(taken: DraftPass, method: str) -> None:
    """Raise an error for an account of a pass that nobody could learn from."""
    if taken.method != method or min(taken.levels, taken.rows) < 0 or not 0 <= taken.seconds < math.inf:
        raise ValueError(f"the proposer {method!r} says that it did {taken}")
