"""A decoder on a CPU whose forward pass is one call of C++.

    batch ──copied──▶ persistent inputs ─▶ tape of T rows ─▶ hidden [T, d] ─▶ tape of L rows ─▶ logits [L, V]

A tape (kernels/cpu/native/tape.py) repeats the kernel calls that the decoder made once, on the same memory: a step
costs no Python per layer. The tables that say which rows see what are made anew in every step, and laid over those that
the tape was recorded with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.batch import LayerKV, RaggedBatch
from ..kernels.cpu.native.attention import NativePlan, overlay
from ..kernels.cpu.native.library import set_num_threads
from ..kernels.cpu.native.tape import Tape, Unrecordable, record
from .decoder import Decoder, Step

log = logging.getLogger(__name__)


class RecordedDecoder:
    """Steps of up to max_tokens rows over one cache, of which up to max_seqs draw. Results are valid until the next."""

    def __init__(self, decoder: Decoder, cache: Sequence[LayerKV], max_tokens: int, max_seqs: int) -> None:
        """Unrecordable if the forward pass is not made of native kernels alone."""
        self.config = decoder.config
        self._decoder, self._cache = decoder, cache
        self._block_size = cache[0].spec.block_size
        self._input_ids, self._positions, self._slots = torch.zeros(3, max_tokens, dtype=torch.int64)
        self._logit_rows = torch.zeros(max_seqs, dtype=torch.int64)
        self._plans = [self._plan(_rows(max_tokens), window) for window in decoder.windows]
        step = Step(self._positions, self._slots, cache, self._plans)
        self._hidden = record(lambda: decoder.run(self._input_ids, step), max_tokens)
        self._logits = self._record_logits(max_seqs)

    def _record_logits(self, max_seqs: int) -> Tape | None:
        """None where the logits go through more than kernels: soft caps, quantized matrices."""
        hidden = self._hidden.result
        try:
            return record(lambda: self._decoder.logits_at(hidden, self._logit_rows), max_seqs)
        except Unrecordable as reason:
            log.info("logits are computed kernel by kernel: %s", reason)
            return None

    def _plan(self, batch: RaggedBatch, window: int | None) -> NativePlan:
        plan = self._decoder.prepare_attention(batch, self._block_size, window)
        if not isinstance(plan, NativePlan):
            raise Unrecordable("attention is not native")
        return plan

    @property
    def num_calls(self) -> int:
        """Kernel calls of a step."""
        return len(self._hidden) + (len(self._logits) if self._logits else 0)

    def forward(self, batch: RaggedBatch, cache: Sequence[LayerKV]) -> Tensor:
        """See Decoder.forward; the cache is the one of the recording."""
        count = batch.num_tokens
        self._input_ids[:count] = batch.input_ids
        self._positions[:count] = batch.positions
        self._slots[:count] = batch.slot_mapping
        plans = [self._plan(batch, window) for window in self._decoder.windows]
        for recorded, plan in zip(self._plans, plans, strict=True):
            overlay(recorded, plan)
        return self._hidden.replay(count)

    def logits_at(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """See Decoder.logits_at; hidden: what `forward` gave last."""
        if self._logits is None:
            return self._decoder.logits_at(hidden, rows)
        count = rows.shape[0]
        self._logit_rows[:count] = rows
        return self._logits.replay(count)

    def logits(self, hidden: Tensor) -> Tensor:
        """See Decoder.logits."""
        return self._decoder.logits(hidden)


def _rows(count: int) -> RaggedBatch:
    """A batch of so many rows that see nothing: its attention plan is laid over before it is used."""
    none = torch.zeros(0, dtype=torch.int32)
    ids = torch.zeros(count, dtype=torch.int64)
    return RaggedBatch(ids, ids, ids, torch.zeros(1, dtype=torch.int32), none, none.view(0, 0), None, ids[:0], 0, 0)


@torch.inference_mode()
def recorded(
    decoder: Decoder, kernels: Kernels, cache: Sequence[LayerKV], max_tokens: int, max_seqs: int
) -> RecordedDecoder | Decoder:
    """The decoder as recorded, or itself where it cannot be."""
    if kernels.attention.name != "native":
        return decoder
    try:
        taped = RecordedDecoder(decoder, cache, max_tokens, max_seqs)
    except Unrecordable as reason:
        log.info("steps call kernels one by one: %s", reason)
        return decoder
    log.info("a step is %d kernel calls in one", taped.num_calls)
    return taped


def share_threads(decoder: Decoder | RecordedDecoder, threads: int) -> None:
    """Give a step's threads to whom its products are computed by: the kernels of a tape, or torch.

    Beside a tape torch has only small things to do. Of whatever it does on several threads these remain, spinning for a
    while on the cores that the kernels compute on: rounds of drawn guesses took 1.1 to 1.2 times as long on two cores.
    """
    taped = isinstance(decoder, RecordedDecoder)
    set_num_threads(threads if taped else 0)
    torch.set_num_threads(1 if taped else threads)
