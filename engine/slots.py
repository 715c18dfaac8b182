"""One persistent row per running sequence, and the ragged batch of a step gathered from the rows.

    StepPlan.new ──fill──▶ rows: token_ids, block_table ──gather(rows of the step)──▶ RaggedBatch

Rows live as long as their sequence runs, so a step copies only what is new.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..kernels.batch import RaggedBatch
from ..kernels.shared_prefix import find_shared_prefixes
from ..scheduler.plan import NewSeq, Row


class SlotTable:
    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int64)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.num_blocks = np.zeros(max_num_seqs, np.int64)

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

    def append(self, slot: int, token_id: int) -> None:
        self.token_ids[slot, self.num_tokens[slot]] = token_id
        self.num_tokens[slot] += 1

    def gather(self, rows: Sequence[Row], logit_rows: Sequence[int]) -> RaggedBatch:
        """The batch of these rows, laid end to end in their order."""
        slots = np.array([row.slot for row in rows])
        starts = np.array([row.start for row in rows])
        counts = np.array([row.num_tokens for row in rows])
        cu_q = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=cu_q[1:])
        sequence = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(cu_q[-1]) + np.repeat(starts - cu_q[:-1], counts)
        seq_lens = starts + counts
        blocks = -(-int(seq_lens.max()) // self.block_size)
        table = self.block_table[slots, :blocks]
        slot_mapping = table[sequence, positions // self.block_size].astype(np.int64) * self.block_size
        slot_mapping += positions % self.block_size
        return RaggedBatch(
            input_ids=self._tensor(self.token_ids[slots[sequence], positions]),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(slot_mapping),
            cu_q=self._tensor(cu_q),
            seq_lens=self._tensor(seq_lens.astype(np.int32)),
            block_table=self._tensor(table),
            tree_mask=None,
            logit_rows=self._tensor(np.array(logit_rows, np.int64)),
            max_q=int(counts.max()),
            max_seq_len=int(seq_lens.max()),
            shared=find_shared_prefixes(table, counts, starts, self.block_size),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
