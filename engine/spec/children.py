"""From a model's logits behind some nodes to the best children of each.

    logits ─ edits of each path ─┬─ greedy ─ log softmax ───────────────────────▶ the likeliest
                                 └─ drawn ── filters ─▶ q ─ log q + Gumbel noise ─▶ the first drawn, without replacement

Noise is a function of the sequence, the position of the token that is drawn and the node that it follows: a tree gives
each node a stretch of columns of its own, node i the one from (i + 1) · V and the root the one from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.reference import noise
from ...kernels.reference.noise import Purpose
from ..sampler import Sampler
from ..sequence_state import SequenceState
from ..transfer import Download, upload
from .tree import Best

BROKEN_LOGITS = "the draft model produced logits that are no numbers; this is a fault of the model or its weights"


class Parent(NamedTuple):
    """A node that children are chosen for.

    node      its number, -1 = the last real token
    path      the tokens from the root's child to it
    position  of its children: their index in the sequence
    """

    state: SequenceState
    node: int
    path: tuple[int, ...]
    position: int


class Children(NamedTuple):
    """best: of each parent; q: what they were drawn from, [V] float32, None = they are the likeliest."""

    best: list[Best]
    q: list[Tensor | None]


def choose_children(sampler: Sampler, logits: Tensor, parents: Sequence[Parent], width: int) -> Children:
    """`width` children of each parent, fewer where fewer may be drawn. logits [R, V]: a row for each parent.

    Raises ValueError for logits that are no numbers.
    """
    edited = sampler.edited(logits, [parent.state for parent in parents], [parent.path for parent in parents])
    width = min(width, edited.shape[1])
    chosen = Children([Best((), (), ())] * len(parents), [None] * len(parents))
    greedy = [row for row, parent in enumerate(parents) if parent.state.params.temperature == 0]
    drawn = [row for row, parent in enumerate(parents) if parent.state.params.temperature > 0]
    if greedy:
        x = sampler.select(edited, greedy)
        log_q = x.log_softmax(dim=-1)
        for row, best in zip(greedy, _largest(x, log_q, log_q, width), strict=True):
            chosen.best[row] = best
    if drawn:
        x, some = sampler.select(edited, drawn), [parents[row] for row in drawn]
        q = sampler.distributions(x, [parent.state for parent in some])
        log_q = q.log()
        found = _largest(x, log_q, log_q + _noise(some, q), width)
        for row, best, own in zip(drawn, found, q.unbind(), strict=True):
            chosen.best[row], chosen.q[row] = best, own
    return chosen


def _noise(parents: Sequence[Parent], q: Tensor) -> Tensor:
    """Gumbel noise like q [R, V]."""
    rows = [(parent.state.seed, parent.state.sample_index, parent.position, parent.node + 1) for parent in parents]
    (columns,) = upload([np.array(rows, np.int64).T.copy()], q.device)
    seeds, sample_index, positions, stretch = columns.unbind()
    vocab = q.shape[1]
    places = stretch[:, None] * vocab + torch.arange(vocab, device=q.device)
    return noise.gumbel(seeds, sample_index, positions, Purpose.DRAFT, places)


def _largest(edited: Tensor, log_q: Tensor, keys: Tensor, width: int) -> list[Best]:
    """Of each row [R, V] those with the largest keys."""
    values, tokens = keys.max(dim=-1, keepdim=True) if width == 1 else keys.topk(width, dim=-1)
    columns = Download([edited.amax(dim=-1), tokens, log_q.gather(-1, tokens), values]).wait()
    found = []
    for top, *best in zip(*(column.tolist() for column in columns), strict=True):
        if top == -torch.inf:  # the edits forbid every token
            found.append(Best((), (), ()))
        elif top != top or top == torch.inf:
            raise ValueError(BROKEN_LOGITS)
        else:
            found.append(Best(*best))
    return found
