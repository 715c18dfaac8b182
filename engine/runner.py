"""Runs a step: a plan becomes one ragged batch, one forward pass, and the tokens drawn from its last rows.

    launch:   StepPlan ──▶ slots ──▶ RaggedBatch ──▶ Decoder ──hidden──▶ logits of the rows that draw ──▶ Sampler
                └──▶ proposers ──guesses──┘                                └─▶ verification, where there are guesses
    collect:  what was drawn, when the device is done ──▶ StepResult

Steps run on the device in the order of their launch, and the next one may be launched before one is collected. What is
guessed is verified at the launch: the host has to know how much of it stays. A request's fault ends that request: what
touches one sequence is tried alone, and a forward pass that raises is run again sequence by sequence.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.batch import LayerKV
from ..scheduler.drafts import DraftOrder
from ..scheduler.plan import DraftPass, Draw, NewSeq, Row, RowResult, StepPlan, StepResult
from .decoder import Decoder
from .graphs import Capture, Graphs
from .recorded import RecordedDecoder
from .sampler import NAN_LOGITS, Drawn, Rated, Sampler
from .slots import SlotTable
from .spec.asking import ask
from .spec.proposer import Draft, Proposer, View
from .spec.verification import Verdict, judge
from .transfer import Download, upload

log = logging.getLogger(__name__)

# Logits of this many prompt rows are made at once for prompt logprobs: at a vocabulary of 150,000 they take 38 MB.
PROMPT_LOGPROB_ROWS = 64

NO_PROPOSERS: Mapping[str, Proposer] = {}


class Placed(NamedTuple):
    """A row with what was guessed for it, and where its result goes."""

    row: Row
    result: RowResult
    draft: Draft | None = None

    @property
    def drawn(self) -> int:
        """Of its tokens, the last so many are drawn from."""
        return (1 if self.draft is None else 1 + len(self.draft.tree.tokens)) if self.row.samples else 0

    def paths(self) -> list[tuple[int, ...]]:
        """The guessed tokens that each of them stands behind."""
        return [() if self.draft is None else self.draft.tree.path(row - 1) for row in range(self.drawn)]


@dataclass(slots=True)
class Launched:
    """A step under way: its results, and what will fill them."""

    step_id: int
    rows: list[RowResult]  # beside StepPlan.rows
    draws: list[RowResult]  # beside StepPlan.draws
    drawn: list[tuple[list[NewSeq], list[RowResult], Drawn]] = field(default_factory=list)
    rated: list[tuple[RowResult, list[Rated]]] = field(default_factory=list)
    chunks: list[tuple[list[RowResult], Download]] = field(default_factory=list)  # and whether each is finite
    drafting: list[DraftPass] = field(default_factory=list)


class ModelRunner:
    def __init__(
        self,
        decoder: Decoder | RecordedDecoder,
        kernels: Kernels,
        cache: list[LayerKV],
        slots: SlotTable,
        sampler: Sampler,
        capture: Capture | None = None,
        proposers: Mapping[str, Proposer] = NO_PROPOSERS,
    ) -> None:
        """capture: how steps of decodes become graphs; None = they do not. proposers: by their method."""
        self.decoder = decoder
        self.cache = cache
        self.slots = slots
        self.sampler = sampler
        self.proposers = proposers
        self.copy_blocks, self.compact = kernels.kv_copy_blocks.run, kernels.kv_compact.run
        self.graphs: Graphs | None = None
        if capture is not None:
            self.graphs = Graphs(lambda batch: self.decoder.forward(batch, self.cache), slots, capture)
        self.graph_steps = self.eager_steps = 0  # forward passes by replay, and kernel by kernel
        self._entered: dict[int, NewSeq] = {}  # slot -> what entered it
        self._failed: dict[int, str] = {}  # slot -> why its sequence cannot run
        self._kept: dict[int, Tensor] = {}  # key -> [V] logits behind a prompt that further samples begin from

    @torch.inference_mode()
    def warm_up(self, max_tokens: int, advance: Callable[[float], None]) -> None:
        """The smallest and the largest step, on the null block, so that no request pays for first times.

        advance: told which part of the graphs is captured, 0 to 1.
        """
        if self.graphs is not None:
            self.graphs.capture_now(self.graphs.shapes.at_start(), advance)
        for count in (1, max_tokens):
            self.rehearse([Row(0, 0, count)])

    @torch.inference_mode()
    def rehearse(self, rows: list[Row]) -> None:
        """The forward pass of these rows, whose slots are free: they read and write the null block only."""
        hidden, drawing = self._forward([Placed(row, RowResult()) for row in rows])
        self.decoder.logits_at(hidden, drawing).sum().item()  # waits for the device

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Set the step going, behind those that were launched before it. Only guesses are waited for.

        An error of one row will be in its RowResult. Raises only if the engine itself is broken.
        """
        for key in plan.forgotten:
            self._kept.pop(key, None)
        for slot in plan.freed:
            self._clear(slot)
        for new in plan.new:
            self._enter(new)
        self._copy(plan.copies)
        step = Launched(plan.step_id, [RowResult() for _ in plan.rows], [RowResult() for _ in plan.draws])
        self._draw_kept(step, plan.draws)
        for row in plan.rows:
            if row.new_block_ids:  # in most steps of a sequence there are none
                self.slots.add_blocks(row.slot, row.new_block_ids)
        placed = self._guess(step, [Placed(row, result) for row, result in zip(plan.rows, step.rows, strict=True)])
        # Short rows first: kernels treat the decodes and the chunks of a step as two contiguous ranges.
        self._run(step, sorted(placed, key=lambda one: one.row.num_tokens))
        return step

    def collect(self, step: Launched) -> StepResult:
        """Wait for a step's results. Slots may be somebody else's by now: all that is needed was launched with it."""
        for entered, results, drawn in step.drawn:
            self.sampler.finish(drawn, results)
            for new, result in zip(entered, results, strict=True):
                if self._entered.get(new.slot) is new:
                    self.slots.learn(new.slot, result.token_ids)
        for results, download in step.chunks:
            (sound,) = download.wait()
            for result, finite in zip(results, sound.tolist(), strict=True):
                if not finite:
                    result.error = result.error or NAN_LOGITS
        for result, ratings in step.rated:
            try:
                result.prompt_logprobs = [logprob for rated in ratings for logprob in rated.wait()] or None
            except Exception as error:
                _without_prompt_logprobs(result, error)
        for result in step.rows:
            result.unsound = result.error == NAN_LOGITS
        return StepResult(step.step_id, step.rows, step.draws, step.drafting)

    def _enter(self, new: NewSeq) -> None:
        self._entered[new.slot] = new
        try:
            self.slots.fill(new)
            self.sampler.add(new.slot, new.params, new.sample_index, list(new.token_ids), new.num_prompt)
            for proposer in self.proposers.values():
                proposer.enter(new.slot)
        except Exception as error:
            log.exception("a sequence cannot enter the batch")
            self._failed[new.slot] = f"the request cannot be run: {type(error).__name__}"

    def _clear(self, slot: int) -> None:
        self._entered.pop(slot, None)
        if self._failed.pop(slot, None) is None:
            self.sampler.remove(slot)

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:
            sources, targets = upload([np.array(pairs, np.int64).T.copy()], self.slots.device)[0]
            for layer in self.cache:
                self.copy_blocks(layer, sources, targets)

    def _guess(self, step: Launched, rows: list[Placed]) -> list[Placed]:
        """The rows with what was guessed for those that are to have guesses, and as long as these make them."""
        asked: dict[str, list[int]] = {}
        views: dict[int, View] = {}
        for i, one in enumerate(rows):
            if one.row.draft is not None and one.row.slot not in self._failed:
                asked.setdefault(one.row.draft.method, []).append(i)
                views[i] = self._view(one.row, one.row.draft)
        for method, places in asked.items():
            answers, passes = ask(self.proposers[method], [views[i] for i in places], self.sampler.vocab_size)
            step.drafting += passes
            for i, answer in zip(places, answers, strict=True):
                rows[i].result.draft_error = answer.error
                rows[i] = rows[i]._replace(draft=answer.draft)
        return [
            one if one.row.draft is None else one._replace(row=one.row._replace(num_tokens=one.drawn)) for one in rows
        ]

    def _view(self, row: Row, order: DraftOrder) -> View:
        slot, table = row.slot, self.slots
        return View(
            slot,
            table.token_ids[slot, : row.start + 1],
            int(table.num_prompt[slot]),
            table.block_table[slot],
            self.sampler.states([slot])[0],
            order.shape,
            self._entered[slot].salt,
            order.go_on,
        )

    def _run(self, step: Launched, rows: list[Placed]) -> None:
        healthy = []
        for one in rows:
            one.result.error = self._failed.get(one.row.slot)
            if one.result.error is None:
                healthy.append(one)
        if healthy:
            self._try(step, healthy)

    def _try(self, step: Launched, rows: list[Placed]) -> None:
        """The rows together; if that raises, each alone, to find the one at fault. Writing K/V twice does no harm."""
        drawing = [one for one in rows if one.drawn]
        self.sampler.fill_masks([one.row.slot for one in drawing], [one.paths() for one in drawing])
        try:
            hidden, drawing = self._forward(rows)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(rows))
            if len(rows) == 1:
                rows[0].result.error = f"the model failed: {type(error).__name__}"
            else:
                for placed in rows:
                    self._try(step, [placed])
            return
        self._watch_chunks(step, rows, hidden)
        self._draw(step, rows, hidden, drawing)
        self._rate_prompts(step, rows, hidden)

    def _watch_chunks(self, step: Launched, rows: list[Placed], hidden: Tensor) -> None:
        """Of rows that nothing is drawn from nobody sees logits: their hidden states are looked at instead, because
        others may share what they wrote before their request draws its first token."""
        chunks: list[RowResult] = []
        sound: list[Tensor] = []
        first = 0
        for one in rows:
            if not one.drawn:
                chunks.append(one.result)
                sound.append(hidden[first : first + one.row.num_tokens].isfinite().all())
            first += one.row.num_tokens
        if chunks:
            step.chunks.append((chunks, Download([torch.stack(sound)])))

    def _forward(self, rows: list[Placed]) -> tuple[Tensor, Tensor]:
        """Hidden states of all tokens [T, d], and the numbers of those that the next tokens are drawn from."""
        ends = itertools.accumulate(one.row.num_tokens for one in rows)
        drawing = [i for one, end in zip(rows, ends, strict=True) for i in range(end - one.drawn, end)]
        plain = [one.row for one in rows]
        if self.graphs is not None and all(row.num_tokens == 1 for row in plain):
            hidden = self.graphs.run(plain)
            if hidden is not None:
                self.graph_steps += 1
                return hidden, upload([np.array(drawing, np.int64)], self.slots.device)[0]
        trees = {i: one.draft.tree for i, one in enumerate(rows) if one.draft is not None}
        batch = self.slots.gather(plain, drawing, trees)
        hidden = self.decoder.forward(batch, self.cache)
        self.eager_steps += 1
        return hidden, batch.logit_rows

    def _draw(self, step: Launched, rows: list[Placed], hidden: Tensor, drawing: Tensor) -> None:
        """drawing: the numbers of the hidden rows that tokens are drawn from."""
        if not len(drawing):
            return
        logits = self.decoder.logits_at(hidden, drawing)
        first = 0
        single: list[tuple[int, Placed]] = []  # with the number of its row of logits
        guessed: list[tuple[int, Placed]] = []  # with that of its first one
        for one in rows:
            if one.row.keeps is not None:
                self._kept[one.row.keeps] = logits[first].clone()  # the sampler may edit its rows in place
            if one.drawn:
                (single if one.draft is None else guessed).append((first, one))
            first += one.drawn
        if guessed:
            self._judge(logits, guessed)
        if single:
            alone = self.sampler.select(logits, [i for i, _ in single])
            slots = [one.row.slot for _, one in single]
            positions = [one.row.start + one.row.num_tokens for _, one in single]
            self._sample(step, alone, slots, positions, [one.result for _, one in single])

    def _judge(self, logits: Tensor, guessed: list[tuple[int, Placed]]) -> None:
        """Keep of the guesses what may stay, and move its K/V to where it belongs."""
        moves: list[tuple[int, int, int]] = []  # slot, node, where it belongs
        for (_, one), verdict in zip(guessed, self._verdicts(logits, guessed), strict=True):
            result = one.result
            result.token_ids, result.logprobs = verdict.result.token_ids, verdict.result.logprobs
            result.drafted, result.draft_depth = verdict.result.drafted, verdict.result.draft_depth
            result.error = verdict.result.error
            self.slots.learn(one.row.slot, result.token_ids)
            first = one.row.start + 1
            moves += [(one.row.slot, first + node, first + i) for i, node in enumerate(verdict.path) if node != i]
        if moves:
            slots, sources, targets = np.array(moves, np.int64).T
            source, target = upload(
                [self.slots.places(slots, sources), self.slots.places(slots, targets)], self.slots.device
            )
            for layer in self.cache:
                self.compact(layer, source, target)

    def _verdicts(self, logits: Tensor, guessed: list[tuple[int, Placed]]) -> list[Verdict]:
        """Of all together; if that raises, of each alone, to find the one at fault."""
        numbers = [i for first, one in guessed for i in range(first, first + one.drawn)]
        rows = [one.row for _, one in guessed]
        try:
            return judge(
                self.sampler,
                self.sampler.select(logits, numbers),
                [row.slot for row in rows],
                [row.start + 1 for row in rows],
                [one.draft for _, one in guessed if one.draft is not None],
            )
        except Exception as error:
            log.exception("the verification of %d sequences failed", len(guessed))
            if len(guessed) > 1:
                return [self._verdicts(logits, [one])[0] for one in guessed]
            return [Verdict(RowResult(error=f"the request cannot be run: {type(error).__name__}"), [])]

    def _draw_kept(self, step: Launched, draws: Sequence[Draw]) -> None:
        """The first tokens of samples whose prompt was computed for another: by the same logits."""
        healthy = []
        for draw, result in zip(draws, step.draws, strict=True):
            result.error = self._failed.get(draw.slot)
            if result.error is None:
                healthy.append((draw, result))
        if healthy:
            slots = [draw.slot for draw, _ in healthy]
            logits = torch.stack([self._kept[draw.kept] for draw, _ in healthy])
            positions = [self._entered[slot].num_prompt for slot in slots]
            self._sample(step, logits, slots, positions, [result for _, result in healthy])

    def _sample(
        self, step: Launched, logits: Tensor, slots: list[int], positions: list[int], results: list[RowResult]
    ) -> None:
        """One token each; if drawing them together raises, each is drawn alone, to find the one at fault."""
        try:
            drawn = self.sampler.draw(logits, slots, positions)
        except Exception as error:
            log.exception("drawing the tokens of %d sequences failed", len(slots))
            if len(slots) == 1:
                results[0].error = f"the request cannot be run: {type(error).__name__}"
                return
            for i in range(len(slots)):
                one = slice(i, i + 1)
                self._sample(step, logits[one], slots[one], positions[one], results[one])
            return
        self.slots.remember(slots, drawn.ids)
        step.drawn.append(([self._entered[slot] for slot in slots], results, drawn))

    def _rate_prompts(self, step: Launched, rows: list[Placed], hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens behind these rows, of those who want them."""
        first = 0
        for row, result, _ in rows:
            new = self._entered[row.slot]
            k = new.params.prompt_logprobs
            if k is not None and new.sample_index == 0:
                try:
                    ratings = self._rate_prompt(row, hidden[first : first + row.num_tokens], k)
                    step.rated.append((result, ratings))
                except Exception as error:
                    _without_prompt_logprobs(result, error)
            first += row.num_tokens

    def _rate_prompt(self, row: Row, hidden: Tensor, k: int) -> list[Rated]:
        """Of the prompt tokens that follow this row's; nothing when the row is past the prompt."""
        last = min(row.start + row.num_tokens, int(self.slots.num_prompt[row.slot]) - 1)
        targets = self.slots.token_ids[row.slot, row.start + 1 : last + 1].tolist()
        ratings = []
        for i in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            some = targets[i : i + PROMPT_LOGPROB_ROWS]
            ratings.append(self.sampler.rate(self.decoder.logits(hidden[i : i + len(some)]), some, k))
        return ratings


def _without_prompt_logprobs(result: RowResult, error: Exception) -> None:
    log.error("no prompt logprobs for one sequence", exc_info=error)
    result.error = result.error or f"the prompt's logprobs failed: {error}"
