"""From a model's logits behind some nodes to the best children of each.

    logits ─ edits of each path ─┬─ greedy ─ log softmax ───────────────────────▶ the likeliest
                                 └─ drawn ── filters ─▶ q ─ log q + Gumbel noise ─▶ the first drawn, without replacement

Noise is a function of the sequence, the position of the token that is drawn and the node that it follows: a tree gives
each node a stretch of columns of its own, node i the one from (i + 1) · V and the root the one from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..sampler import Sampler
from ..sequence_state import SequenceState
from ..transfer import Download, upload
from .tree import Best

BROKEN_LOGITS = "the draft model produced logits that are no numbers; this is a fault of the model or its weights"

NOBODY = Best((), (), ())


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
    """best: of each parent; q: what they were drawn from, [V] float32, None = they are the likeliest; edited: logits
    [R, V] with the requests' edits, before temperature and filters."""

    best: list[Best]
    q: list[Tensor | None]
    edited: Tensor


def choose_children(sampler: Sampler, logits: Tensor, parents: Sequence[Parent], width: int) -> Children:
    """`width` children of each parent, fewer where fewer may be drawn. logits [R, V]: a row for each parent.

    Raises ValueError for logits that are no numbers.
    """
    edited = sampler.edited(logits, [parent.state for parent in parents], [parent.path for parent in parents])
    width = min(width, edited.shape[1])
    chosen = Children([NOBODY] * len(parents), [None] * len(parents), edited)
    greedy = [row for row, parent in enumerate(parents) if parent.state.params.temperature == 0]
    drawn = [row for row, parent in enumerate(parents) if parent.state.params.temperature > 0]
    if greedy:
        for row, best in zip(greedy, _likeliest(sampler, sampler.select(edited, greedy), width), strict=True):
            chosen.best[row] = best
    if drawn:
        x, some = sampler.select(edited, drawn), [parents[row] for row in drawn]
        q = sampler.distributions(x, [parent.state for parent in some])
        tokens, keys = sampler.kernels.draw_children.run(q, width, *_sources(some, q.device))
        found = _wait(sampler, x, tokens, q.gather(-1, tokens).log(), keys)
        for row, best, own in zip(drawn, found, q.unbind(), strict=True):
            chosen.best[row], chosen.q[row] = best, own
    return chosen


def _likeliest(sampler: Sampler, edited: Tensor, width: int) -> list[Best]:
    if width == 1:
        values, tokens = sampler.kernels.greedy.run(edited)
        return _wait(sampler, edited, tokens[:, None], values[:, None], values[:, None])
    log_q, tokens = edited.log_softmax(dim=-1).topk(width, dim=-1)
    return _wait(sampler, edited, tokens, log_q, log_q)


def _sources(parents: Sequence[Parent], device: torch.device) -> Sequence[Tensor]:
    """Where the noise of each parent's children comes from: seeds, sample indices, positions, nodes."""
    rows = [(parent.state.seed, parent.state.sample_index, parent.position, parent.node + 1) for parent in parents]
    return upload([np.array(rows, np.int64).T.copy()], device)[0].unbind()


def _wait(sampler: Sampler, edited: Tensor, tokens: Tensor, log_q: Tensor, keys: Tensor) -> list[Best]:
    """Columns [R, width] on the device as rows on the host."""
    largest, _ = sampler.kernels.greedy.run(edited)
    columns = Download([largest, tokens, log_q, keys]).wait()
    found = []
    for top, *best in zip(*(column.tolist() for column in columns), strict=True):
        if top == -math.inf:  # the edits forbid every token
            found.append(NOBODY)
        elif not math.isfinite(top):
            raise ValueError(BROKEN_LOGITS)
        else:
            found.append(Best(*best))
    return found
