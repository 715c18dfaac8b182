"""Asks a proposer, and believes nothing: what it raises or makes up costs one request its guesses, and no more."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from ...scheduler.plan import DraftPass
from .proposer import Draft, Proposer, View

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What is guessed for one sequence, or why its proposer is not to be asked again."""

    draft: Draft | None = None
    error: str | None = None


def ask(proposer: Proposer, views: Sequence[View], vocab_size: int) -> tuple[list[Answer], list[DraftPass]]:
    """An answer for each view. If the proposer fails for all of them together, each is asked for alone."""
    try:
        drafts, taken = proposer.propose(views)
        for view, draft in zip(views, drafts, strict=True):
            if draft is not None:
                check(draft, view, vocab_size)
    except Exception as error:
        log.exception("the proposer %r failed for %d sequences", proposer.method, len(views))
        if len(views) == 1:
            return [Answer(error=f"{type(error).__name__}: {error}")], []
        alone = [ask(proposer, [view], vocab_size) for view in views]
        return [answers[0] for answers, _ in alone], [taken for _, passes in alone for taken in passes]
    return [Answer(draft if draft is not None and draft.tree.tokens else None) for draft in drafts], [taken]


def check(draft: Draft, view: View, vocab_size: int) -> None:
    """Raise ValueError for a draft that is not what was ordered, or could not be verified."""
    tokens, parents = draft.tree
    if len(tokens) > view.shape.nodes:
        raise ValueError(f"{len(tokens)} tokens were guessed where {view.shape.nodes} were asked for")
    if len(parents) != len(tokens) or not all(-1 <= parent < node for node, parent in enumerate(parents)):
        raise ValueError(f"the parents of {len(tokens)} guesses are {parents}: each must precede its children")
    if max(draft.tree.depths(), default=0) > view.shape.depth:
        raise ValueError(f"guesses are {max(draft.tree.depths())} deep where {view.shape.depth} were asked for")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {token} was guessed; ids go from 0 to {vocab_size - 1}")
    if draft.q is not None and draft.q.shape != (len(tokens) + 1, vocab_size):
        raise ValueError(f"q is {tuple(draft.q.shape)} for {len(tokens)} guesses over {vocab_size} tokens")
    if draft.q is not None and view.state.params.temperature == 0:
        raise ValueError("a greedy request is given guesses with a distribution")
