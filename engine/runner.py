"""Runs a step: a plan becomes one ragged batch, one forward pass, and the tokens drawn from its last rows.

    StepPlan ──▶ slots ──▶ RaggedBatch ──▶ Decoder ──hidden──▶ logits of the rows that draw ──▶ Sampler ──▶ StepResult

A request's fault ends that request: what touches one sequence is tried alone, and a forward pass that raises is run
again sequence by sequence.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.batch import LayerKV, RaggedBatch
from ..scheduler.plan import Draw, NewSeq, Row, RowResult, StepPlan, StepResult, TokenLogprob
from .decoder import Decoder
from .sampler import Sampler
from .slots import SlotTable

log = logging.getLogger(__name__)

# Logits of this many prompt rows are made at once for prompt logprobs: at a vocabulary of 150,000 they take 38 MB.
PROMPT_LOGPROB_ROWS = 64


class ModelRunner:
    def __init__(
        self,
        decoder: Decoder,
        kernels: Kernels,
        cache: list[LayerKV],
        slots: SlotTable,
        sampler: Sampler,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.slots = slots
        self.sampler = sampler
        self.copy_blocks = kernels.kv_copy_blocks.run
        self._entered: dict[int, NewSeq] = {}  # slot -> what entered it
        self._failed: dict[int, str] = {}  # slot -> why its sequence cannot run
        self._kept: dict[int, Tensor] = {}  # key -> [V] logits behind a prompt that further samples begin from

    @torch.inference_mode()
    def warm_up(self, max_tokens: int) -> None:
        """The smallest and the largest step, on the null block, so that no request pays for first times."""
        for count in (1, max_tokens):
            self.rehearse([Row(0, 0, count)])

    @torch.inference_mode()
    def rehearse(self, rows: list[Row]) -> None:
        """The forward pass of these rows, whose slots are free: they read and write the null block only."""
        batch, hidden = self._forward(rows)
        self.decoder.logits(hidden[batch.logit_rows]).sum().item()  # waits for the device

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run the step; an error of one row is in its RowResult. Raises only if the engine itself is broken."""
        for key in plan.forgotten:
            self._kept.pop(key, None)
        for slot in plan.freed:
            self._clear(slot)
        for new in plan.new:
            self._enter(new)
        self._copy(plan.copies)
        draws = self._draw_kept(plan.draws)
        for row in plan.rows:
            self.slots.add_blocks(row.slot, row.new_block_ids)
        # Short rows first: kernels treat the decodes and the chunks of a step as two contiguous ranges.
        order = sorted(range(len(plan.rows)), key=lambda i: plan.rows[i].num_tokens)
        results = self._run([plan.rows[i] for i in order])
        placed = [RowResult()] * len(order)
        for i, result in zip(order, results, strict=True):
            placed[i] = result
        return StepResult(plan.step_id, placed, draws)

    def _enter(self, new: NewSeq) -> None:
        self._entered[new.slot] = new
        try:
            self.slots.fill(new)
            self.sampler.add(new.slot, new.params, new.sample_index, list(new.token_ids), new.num_prompt)
        except Exception as error:
            log.exception("a sequence cannot enter the batch")
            self._failed[new.slot] = f"the request cannot be run: {type(error).__name__}"

    def _clear(self, slot: int) -> None:
        self._entered.pop(slot, None)
        if self._failed.pop(slot, None) is None:
            self.sampler.remove(slot)

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.slots.device).T
            for layer in self.cache:
                self.copy_blocks(layer, sources, targets)

    def _run(self, rows: list[Row]) -> list[RowResult]:
        healthy = [row for row in rows if row.slot not in self._failed]
        results = dict(zip((row.slot for row in healthy), self._try(healthy), strict=True)) if healthy else {}
        return [results.get(row.slot) or RowResult(error=self._failed[row.slot]) for row in rows]

    def _try(self, rows: list[Row]) -> list[RowResult]:
        """The rows together; if that raises, each alone, to find the one at fault. Writing K/V twice does no harm."""
        try:
            batch, hidden = self._forward(rows)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(rows))
            if len(rows) == 1:
                return [RowResult(error=f"the model failed: {type(error).__name__}")]
            return [result for row in rows for result in self._try([row])]
        return self._draw(rows, batch, hidden)

    def _forward(self, rows: list[Row]) -> tuple[RaggedBatch, Tensor]:
        ends = itertools.accumulate(row.num_tokens for row in rows)
        drawing = [end - 1 for row, end in zip(rows, ends, strict=True) if row.samples]
        batch = self.slots.gather(rows, drawing)
        return batch, self.decoder.forward(batch, self.cache)

    def _draw(self, rows: list[Row], batch: RaggedBatch, hidden: Tensor) -> list[RowResult]:
        results = {row.slot: RowResult() for row in rows}
        drawing = [row for row in rows if row.samples]
        if drawing:
            logits = self.decoder.logits(hidden[batch.logit_rows])
            for i, row in enumerate(drawing):
                if row.keeps is not None:
                    self._kept[row.keeps] = logits[i].clone()  # the sampler may edit its rows in place
            slots = [row.slot for row in drawing]
            drawn = self._sample(logits, slots, [row.start + row.num_tokens for row in drawing])
            results |= zip(slots, drawn, strict=True)
        first = 0
        for row in rows:
            result, new = results[row.slot], self._entered[row.slot]
            k = new.params.prompt_logprobs
            if k is not None and new.sample_index == 0 and result.error is None:
                try:
                    result.prompt_logprobs = self._prompt_logprobs(row, hidden[first : first + row.num_tokens], k)
                except Exception as error:
                    log.exception("no prompt logprobs for one sequence")
                    results[row.slot] = RowResult(error=f"the prompt's logprobs failed: {error}")
            first += row.num_tokens
        return list(results.values())

    def _draw_kept(self, draws: Sequence[Draw]) -> list[RowResult]:
        """The first tokens of samples whose prompt was computed for another: by the same logits."""
        slots = [draw.slot for draw in draws if draw.slot not in self._failed]
        results = {draw.slot: RowResult(error=self._failed.get(draw.slot)) for draw in draws}
        if slots:
            logits = torch.stack([self._kept[draw.kept] for draw in draws if draw.slot in slots])
            drawn = self._sample(logits, slots, [self._entered[slot].num_prompt for slot in slots])
            results |= zip(slots, drawn, strict=True)
        return list(results.values())

    def _sample(self, logits: Tensor, slots: list[int], positions: list[int]) -> list[RowResult]:
        drawn = self.sampler.sample(logits, slots, positions)
        for slot, result in zip(slots, drawn, strict=True):
            for token_id in result.token_ids:
                self.slots.append(slot, token_id)
        return drawn

    def _prompt_logprobs(self, row: Row, hidden: Tensor, k: int) -> list[TokenLogprob] | None:
        """Of the prompt tokens that follow this row's; None when the row is past the prompt."""
        last = min(row.start + row.num_tokens, int(self.slots.num_prompt[row.slot]) - 1)
        targets = self.slots.token_ids[row.slot, row.start + 1 : last + 1].tolist()
        logprobs: list[TokenLogprob] = []
        for i in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            some = targets[i : i + PROMPT_LOGPROB_ROWS]
            logprobs += self.sampler.prompt_logprobs(self.decoder.logits(hidden[i : i + len(some)]), some, k)
        return logprobs or None
