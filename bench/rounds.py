"""One round of guessing at given contexts, of which nothing stays: the same contexts for every method and shape.

    contexts ──prefill once──▶ engine's cache ──┬─ propose ─▶ forward ─▶ judge ─▶ tokens of the round
                                                └─ again, with another method, shape or seed

What an engine generates in a run depends on its guesses' luck; here all are asked about the same, so a difference is
one of the methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..engine.runner import ModelRunner
from ..engine.sequence_state import SequenceState
from ..engine.spec.proposer import Draft, DraftTree, Proposer, View
from ..engine.spec.verification import judge
from ..scheduler.drafts import DraftShape, chain
from ..scheduler.params import SamplingParams
from ..scheduler.plan import NewSeq, Row, StepPlan
from .iid_trees import accepted, join

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.core import EngineCore


NOTHING = Draft(DraftTree((), ()))


class Round(NamedTuple):
    """Of each context: tokens, accepted ones and one more; nodes that were verified."""

    tokens: list[int]
    nodes: list[int]


class Rounds:
    """Contexts in the slots of an engine that serves nobody."""

    def __init__(self, core: EngineCore, contexts: Sequence[Sequence[int]], room: int) -> None:
        """room: guesses behind each context at most. ValueError when the engine has not that much room."""
        runner, self.contexts = core.runner, [list(ids) for ids in contexts]
        self.runner: ModelRunner = runner
        size = runner.slots.block_size
        blocks = [-(-(len(ids) + room) // size) for ids in self.contexts]
        if len(blocks) > runner.slots.max_num_seqs or sum(blocks) >= core.ready.num_blocks:
            raise ValueError(f"{len(blocks)} contexts of {sum(blocks)} blocks do not fit into this engine")
        self._most = core.ready.max_num_batched_tokens
        first = 1
        for slot, (ids, count) in enumerate(zip(self.contexts, blocks, strict=True)):
            own = tuple(range(first, first + count))
            self._enter(NewSeq(slot, tuple(ids), len(ids), SamplingParams(max_tokens=1), 0, own))
            first += count

    def _enter(self, new: NewSeq) -> None:
        plan = StepPlan(0, new=[new])
        for start in range(0, max(1, len(new.token_ids) - 1), self._most):
            count = min(self._most, len(new.token_ids) - 1 - start)
            plan.rows = [Row(new.slot, start, count, samples=False)] if count > 0 else []
            self.runner.collect(self.runner.launch(plan))
            plan = StepPlan(0)

    def warm_up(self, proposer: Proposer) -> None:
        """Let it compute what it keeps of the contexts: until it has done so it has no guesses."""
        (views,) = self._groups(chain(1), 0.0, 0, at_once=len(self.contexts))
        silent = len(views) + 1
        while silent > (silent := sum(draft is None for draft in proposer.propose(views)[0])) > 0:
            pass

    def play(self, proposer: Proposer, shape: DraftShape, temperature: float, seed: int, go_on: float = 0.0) -> Round:
        """One round at every context. go_on: see DraftOrder."""
        tokens: list[int] = []
        nodes: list[int] = []
        for views in self._groups(shape, temperature, seed, self._most // (1 + shape.nodes), go_on):
            guesses = [draft or NOTHING for draft in proposer.propose(views)[0]]
            tokens += [len(out) for out in self._judged(views, guesses)]
            nodes += [len(draft.tree.tokens) for draft in guesses]
        return Round(tokens, nodes)

    @torch.inference_mode()
    def play_independent(self, proposer: Proposer, shape: DraftShape, temperature: float, seed: int) -> Round:
        """One round at every context with widths[0] chains that know nothing of each other in place of a beam."""
        generator = torch.Generator().manual_seed(seed)
        count, alone = shape.widths[0], chain(shape.depth)
        tokens: list[int] = []
        nodes: list[int] = []
        for views in self._groups(alone, temperature, seed, self._most // (1 + shape.nodes)):
            several = [
                proposer.propose(self._with_seeds(views, temperature, seed * count + i + 1))[0] for i in range(count)
            ]
            drafts = [join([draft or NOTHING for draft in chains]) for chains in zip(*several, strict=True)]
            logits = self.logits(views, [draft.tree for draft in drafts])
            rows = [1 + len(draft.tree.tokens) for draft in drafts]
            states = [view.state for view, count in zip(views, rows, strict=True) for _ in range(count)]
            p = self.runner.sampler.distributions(logits, states).split(rows)
            tokens += [len(accepted(*one, generator)) for one in zip(drafts, p, strict=True)]
            nodes += [len(draft.tree.tokens) for draft in drafts]
        return Round(tokens, nodes)

    def _with_seeds(self, views: Sequence[View], temperature: float, seed: int) -> list[View]:
        return [replace(view, state=self._state(view.slot, temperature, seed)) for view in views]

    def _state(self, slot: int, temperature: float, seed: int) -> SequenceState:
        """What a request would have there that has drawn nothing yet."""
        sampler, ids = self.runner.sampler, self.contexts[slot]
        params = SamplingParams(max_tokens=1, temperature=temperature, seed=seed * len(self.contexts) + slot)
        sampler.add(slot, params, 0, ids, len(ids))
        return sampler.states([slot])[0]

    def _groups(
        self, shape: DraftShape, temperature: float, seed: int, at_once: int, go_on: float = 0.0
    ) -> list[list[View]]:
        """Views of all contexts, so many at once."""
        table = self.runner.slots.block_table
        views = [
            View(slot, np.array(ids), len(ids), table[slot], self._state(slot, temperature, seed), shape, go_on=go_on)
            for slot, ids in enumerate(self.contexts)
        ]
        return [views[i : i + at_once] for i in range(0, len(views), at_once)]

    @torch.inference_mode()
    def _judged(self, views: Sequence[View], drafts: Sequence[Draft]) -> list[list[int]]:
        """The tokens of each."""
        verdicts = judge(
            self.runner.sampler,
            self.logits(views, [draft.tree for draft in drafts]),
            [view.slot for view in views],
            [len(view.token_ids) for view in views],
            drafts,
        )
        for verdict in verdicts:
            if verdict.result.error is not None:
                raise RuntimeError(verdict.result.error)
        return [verdict.result.token_ids for verdict in verdicts]

    @torch.inference_mode()
    def logits(self, views: Sequence[View], trees: Sequence[DraftTree]) -> Tensor:
        """Of the target [R, V], at the root and all nodes of each tree."""
        rows = [
            Row(view.slot, len(view.token_ids) - 1, 1 + len(tree.tokens))
            for view, tree in zip(views, trees, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda i: rows[i].num_tokens)  # as the runner has them
        ordered = [rows[i] for i in order]
        count = sum(row.num_tokens for row in rows)
        batch = self.runner.slots.gather(ordered, list(range(count)), dict(enumerate(trees[i] for i in order)))
        hidden = self.runner.decoder.forward(batch, self.runner.cache)
        logits = self.runner.decoder.logits_at(hidden, batch.logit_rows)
        parts = dict(zip(order, logits.split([row.num_tokens for row in ordered]), strict=True))
        return torch.cat([parts[i] for i in range(len(rows))])
