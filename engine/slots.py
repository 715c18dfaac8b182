"""One persistent row per running sequence, and the ragged batch of a step gathered from the rows.

    StepPlan.new ──fill──▶ rows: token_ids, block_table ──gather(rows of the step)──▶ RaggedBatch
                                   last_token ◀──remember── what the step drew ◀───────────┘

Rows live as long as their sequence runs, so a step copies only what is new. What a sequence draws stays on the device:
the next step takes it from there, whether or not the host knows it by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.batch import SHORT_ROWS, RaggedBatch
from ..kernels.shared_prefix import find_shared_prefixes
from ..scheduler.plan import NewSeq, Row
from .transfer import upload

KNOWN = -1  # among the sources: the host has the row's tokens


class Layout(NamedTuple):
    """The host's half of a RaggedBatch, and where tokens come from that the host does not have.

    A row that begins past what its sequence entered with is one token long: the last that was drawn for its slot.
    """

    input_ids: np.ndarray  # [T] int64; of rows with a source anything
    positions: np.ndarray  # [T] int64
    slot_mapping: np.ndarray  # [T] int64
    cu_q: np.ndarray  # [S + 1] int32
    seq_lens: np.ndarray  # [S] int32
    block_table: np.ndarray  # [S, B] int32
    max_q: int  # of counts
    longest: int  # of seq_lens
    starts: np.ndarray  # [S]: tokens before those of this step
    counts: np.ndarray  # [S]: rows of each sequence
    sources: np.ndarray  # [S] int64: the slot whose last token the row is, or KNOWN


class SlotTable:
    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.device = device
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int64)  # that the sequence entered with
        self.num_tokens = np.zeros(max_num_seqs, np.int64)  # of these
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.num_blocks = np.zeros(max_num_seqs, np.int64)
        self.last_token = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)  # drawn since

    def fill(self, new: NewSeq) -> None:
        slot, count = new.slot, len(new.token_ids)
        self.token_ids[slot, :count] = new.token_ids
        self.num_tokens[slot] = count
        self.num_prompt[slot] = new.num_prompt
        self.num_blocks[slot] = 0
        self.block_table[slot] = 0
        self.add_blocks(slot, new.block_ids)

    def add_blocks(self, slot: int, block_ids: Sequence[int]) -> None:
        start = self.num_blocks[slot]
        self.block_table[slot, start : start + len(block_ids)] = block_ids
        self.num_blocks[slot] += len(block_ids)

    def remember(self, slots: Sequence[int], ids: Tensor) -> None:
        """The tokens ids [n] int64 were drawn for these slots."""
        (index,) = upload([np.array(slots, np.int64)], self.device)
        self.last_token.index_copy_(0, index, ids)

    def lay_out(self, rows: Sequence[Row]) -> Layout:
        """These rows laid end to end in their order."""
        slots, starts, counts = np.array(
            [[row.slot for row in rows], [row.start for row in rows], [row.num_tokens for row in rows]]
        )
        max_q = max([row.num_tokens for row in rows])
        longest = max([row.start + row.num_tokens for row in rows])
        sequence, positions = np.arange(len(rows)), starts
        cu_q = np.arange(len(rows) + 1, dtype=np.int32)
        if max_q > 1:
            np.cumsum(counts, out=cu_q[1:])
            sequence = np.repeat(sequence, counts)
            positions = np.arange(cu_q[-1]) + np.repeat(starts - cu_q[:-1], counts)
        table = self.block_table[slots, : -(-longest // self.block_size)]
        blocks, offsets = np.divmod(positions, self.block_size)
        return Layout(
            self.token_ids[slots[sequence], positions],
            positions,
            table[sequence, blocks] * np.int64(self.block_size) + offsets,
            cu_q,
            (starts + counts).astype(np.int32),
            table,
            max_q,
            longest,
            starts,
            counts,
            np.where(starts >= self.num_tokens[slots], slots, KNOWN),
        )

    def gather(self, rows: Sequence[Row], logit_rows: Sequence[int]) -> RaggedBatch:
        """The batch of these rows, laid end to end in their order."""
        layout = self.lay_out(rows)
        drawn = np.flatnonzero(layout.sources >= 0)
        at, of = layout.cu_q[drawn].astype(np.int64), layout.sources[drawn]
        *fields, logits_of, at, of = upload([*layout[:6], np.array(logit_rows, np.int64), at, of], self.device)
        batch = RaggedBatch(
            *fields,
            tree_mask=None,
            logit_rows=logits_of,
            max_q=layout.max_q,
            max_seq_len=layout.longest,
            short_seqs=len(rows) if layout.max_q <= SHORT_ROWS else int((layout.counts > SHORT_ROWS).argmax()),
            shared=find_shared_prefixes(layout.block_table, layout.counts, layout.starts, self.block_size),
        )
        if len(drawn) == batch.num_tokens:
            batch.input_ids = self.last_token.index_select(0, of)
        elif len(drawn):
            batch.input_ids.index_copy_(0, at, self.last_token.index_select(0, of))
        return batch
