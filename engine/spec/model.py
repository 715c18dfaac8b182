"""Guesses by a model: an independent one, or a part of the target.

    draft    a small model with a cache of its own over the target's block numbers; what is missing there it computes
    nested   the target with narrower feed-forwards, and
    layers   the target without some of its layers: both read the target's cache. What they write there, for the last
             token and for guesses, the target's pass overwrites before anything attends to it.

    views ─▶ catch up, last token ─▶ logits ─▶ children ─▶ their tokens ─▶ logits ─▶ children ─▶ ... ─▶ Draft

All sequences of a step grow together, one pass of the model for each level. A chain's pass is one token long; a tree's
holds all its nodes again, as only rows of one batch can be hidden from each other, and few rows cost little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...kernels.batch import LayerKV
from ...scheduler.plan import DraftPass
from ..decoder import Decoder
from ..recorded import RecordedDecoder
from ..sampler import Sampler
from ..transfer import upload
from .acceptance import AcceptanceHead
from .children import Children, Parent, choose_children
from .confidence import Confidence, Drawn
from .contents import CacheContents
from .proposer import Draft, View
from .segments import Segment, gather
from .tree import Growth


class _Guess:
    """One view's guesses while they grow. known: leading tokens whose keys and values are in the proposer's cache."""

    def __init__(self, view: View, growth: Growth, known: int) -> None:
        self.view, self.growth, self.known = view, growth, known
        self.length = len(view.token_ids)
        self.q: dict[int, Tensor] = {}  # node -> what its children were drawn from
        self.acceptance = 1.0  # of all guesses that were judged

    @property
    def is_chain(self) -> bool:
        return self.view.shape.kind == "chain"

    def first(self, limit: int) -> Segment:
        """At most `limit` of the rows that lead to the children of the last token."""
        tokens = self.view.token_ids[self.known : self.known + limit]
        wanted = [len(tokens) - 1] if self.known + len(tokens) == self.length else []
        return Segment(self.view.block_table, self.known, tokens, wanted)

    def next(self) -> Segment:
        """The rows that lead to the children of the frontier."""
        growth, table = self.growth, self.view.block_table
        if self.is_chain:
            (node,) = growth.frontier
            return Segment(table, self.length + node, growth.tokens[node:], [0])
        return Segment(table, self.length, growth.tokens, growth.frontier, growth.parents)

    def parents(self) -> list[Parent]:
        growth, state = self.growth, self.view.state
        return [Parent(state, node, growth.path(node), self.length + growth.depth(node)) for node in growth.frontier]

    def draft(self) -> Draft | None:
        tree = self.growth.tree
        if not tree.tokens or not self.q:
            return Draft(tree) if tree.tokens else None
        rows = list(self.q.values())
        q = rows[0].new_zeros(1 + len(tree.tokens), len(rows[0]))
        for node, row in self.q.items():
            q[node + 1] = row
        return Draft(tree, q)


class ModelProposer:
    """See Proposer."""

    def __init__(
        self,
        method: str,
        decoder: Decoder | RecordedDecoder,
        cache: list[LayerKV],
        sampler: Sampler,
        *,
        max_tokens: int,
        eos_token_ids: Sequence[int],
        contents: CacheContents | None = None,
        head: AcceptanceHead | Confidence | None = None,
    ) -> None:
        """
        decoder     takes max_tokens rows at once, and gives as many logits as the frontiers of a step have nodes
        sampler     the target's, whose tokens are guessed: logits beyond them are padding, and are cut. Tokens that the
                    model does not know are never guessed, and read as its last one
        max_tokens  rows of the first pass of a step: what is missing more takes further steps
        contents    of the cache, if it is the proposer's own; None = the target fills it
        head        says how likely guesses are accepted; chains end where it doubts
        """
        self.method = method
        self._decoder, self._cache, self._sampler = decoder, cache, sampler
        self._max_tokens, self._eos_token_ids = max_tokens, frozenset(eos_token_ids)
        self._contents, self.head = contents, head
        self._missing = sampler.vocab_size - decoder.config.vocab_size  # tokens that the model does not know
        self._block_size, self._device = cache[0].spec.block_size, cache[0].k.device

    def enter(self, slot: int) -> None:
        if self._contents is not None:
            self._contents.enter(slot)

    @torch.inference_mode()
    def propose(self, views: Sequence[View]) -> tuple[list[Draft | None], DraftPass]:
        """See Proposer. Raises ValueError for logits that are no numbers, and what the model raises."""
        started = time.perf_counter()
        guesses = [self._begin(view) for view in views]
        passes = self._first_pass(guesses)
        caught_up = sum(len(segment.tokens) - len(segment.wanted) for _, segment in passes)
        levels = rows = 0
        while passes:
            rows += self._run(passes)
            levels += 1
            growing = [guess for guess, segment in passes if segment.wanted and guess.growth.frontier]
            # In the order of a batch: few rows first.
            passes = sorted(((guess, guess.next()) for guess in growing), key=lambda one: len(one[1].tokens))
        drafts = [guess.draft() for guess in guesses]
        return drafts, DraftPass(self.method, levels, rows, time.perf_counter() - started, caught_up)

    def _begin(self, view: View) -> _Guess:
        params = view.state.params
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)}
        known = len(view.token_ids) - 1
        if self._contents is not None:
            known = min(known, self._contents.count(view.slot, view.token_ids, view.block_table))
        return _Guess(view, Growth(view.shape, params.temperature > 0, ends), known)

    def _first_pass(self, guesses: Sequence[_Guess]) -> list[tuple[_Guess, Segment]]:
        """The last tokens and what is missing before them: as far as there is room, who misses least first."""
        passes, room = [], self._max_tokens
        for guess in sorted(guesses, key=lambda guess: guess.length - guess.known):
            if room > 0 and guess.growth.frontier:
                segment = guess.first(room)
                room -= len(segment.tokens)
                passes.append((guess, segment))
        return sorted(passes, key=lambda one: len(one[1].tokens))

    def _run(self, passes: Sequence[tuple[_Guess, Segment]]) -> int:
        """One pass of the model, and the children that come of it. Returns its rows."""
        batch = gather([segment for _, segment in passes], self._block_size, self._device)
        if self._missing > 0:
            batch.input_ids.clamp_(max=self._decoder.config.vocab_size - 1)
        hidden = self._decoder.forward(batch, self._cache)
        if self._contents is not None:
            for guess, segment in passes:
                _record(self._contents, guess, segment)
        wanting = [(guess, segment) for guess, segment in passes if segment.wanted]
        if wanting:
            logits = self._decoder.logits_at(hidden, batch.logit_rows)[:, : self._sampler.vocab_size]
            if self._missing > 0:
                logits = pad(logits, (0, self._missing), value=-math.inf)
            children = self._extend([guess for guess, _ in wanting], logits)
            if self.head is not None:
                self._doubt(self.head, wanting, hidden[batch.logit_rows], children.edited)
        return batch.num_tokens

    def _extend(self, guesses: Sequence[_Guess], logits: Tensor) -> Children:
        """The next level of each. logits [R, V]: behind all nodes of their frontiers."""
        parents = [guess.parents() for guess in guesses]
        width = max(guess.growth.width for guess in guesses)
        children = choose_children(self._sampler, logits, [node for some in parents for node in some], width)
        first = 0
        for guess, some in zip(guesses, parents, strict=True):
            last = first + len(some)
            for parent, q in zip(some, children.q[first:last], strict=True):
                if q is not None:
                    guess.q[parent.node] = q
            guess.growth.extend(children.best[first:last])
            first = last
        return children

    def _doubt(
        self,
        head: AcceptanceHead | Confidence,
        passes: Sequence[tuple[_Guess, Segment]],
        hidden: Tensor,
        edited: Tensor,
    ) -> None:
        """End the chains whose guesses are not worth another. What a pass has drawn stays, whatever is thought of it.

        hidden [R, d], edited [R, V]: behind all nodes of the frontiers. A late head has nothing to say of the last real
        token.
        """
        judged, row = {}, 0  # a chain's row -> the chain
        for guess, segment in passes:
            if guess.is_chain and guess.growth.frontier and (segment.start >= guess.length or not head.late):
                judged[row] = guess
            row += len(segment.wanted)
        if not judged:
            return
        chains, rows = list(judged.values()), list(judged)
        whats = [(guess.growth.tokens[-1], guess.view.state.params.temperature) for guess in chains]
        tokens, temperatures = upload([np.array(column) for column in zip(*whats, strict=True)], hidden.device)
        drawn = Drawn(hidden[rows], edited[rows], tokens, temperatures.float())
        for guess, acceptance in zip(chains, head.acceptance(drawn).tolist(), strict=True):
            guess.acceptance *= acceptance
            if guess.acceptance < head.least(guess.view.go_on):
                guess.growth.stop()


def _record(contents: CacheContents, guess: _Guess, segment: Segment) -> None:
    """What a pass has left in the proposer's own cache. A tree's nodes do not lie where their tokens would."""
    view, end = guess.view, segment.start + len(segment.tokens)
    tokens = view.token_ids[:end]
    if guess.is_chain and end > guess.length:
        tokens = np.concatenate([tokens, guess.growth.tokens[: end - guess.length]])
    contents.record(view.slot, tokens, view.block_table, end)
