"""One persistent row per running sequence, and the ragged batch of a step gathered from the rows.

    StepPlan.new ──fill──▶ rows: token_ids, block_table ──gather(rows of the step)──▶ RaggedBatch
                                   last_token ◀──remember── what the step drew ◀───────────┘

Rows live as long as their sequence runs, so a step copies only what is new. What a sequence draws stays on the device:
the next step takes it from there if the host does not know it by then. Behind its last token a sequence has room for
guesses: node i of a draft is stored i + 1 places after it, whatever its depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.batch import RaggedBatch
from ..kernels.shared_prefix import find_shared_prefixes
from ..scheduler.drafts import MAX_NODES
from ..scheduler.plan import NewSeq, Row
from .ragged import Layout, Parents, batch_of, lay_out, places
from .spec.proposer import DraftTree
from .transfer import upload

KNOWN = -1  # among the sources: the host has the row's tokens
NO_TREES: Mapping[int, DraftTree] = {}


class Rows(NamedTuple):
    """Rows of a step laid end to end, and where tokens come from that the host does not have.

    A row that begins past what the host knows of its sequence is one token long: the last that was drawn for its slot.
    """

    layout: Layout
    input_ids: np.ndarray  # [T] int64; of rows with a source anything
    sources: np.ndarray  # [S] int64: the slot whose last token the row is, or KNOWN
    starts: np.ndarray  # [S]: tokens before those of this step
    counts: np.ndarray  # [S]: rows of each sequence


class SlotTable:
    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.device = device
        longest = max_model_len + MAX_NODES
        self.token_ids = np.zeros((max_num_seqs, longest + 1), np.int64)  # that the host knows
        self.num_tokens = np.zeros(max_num_seqs, np.int64)  # of these
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.block_table = np.zeros((max_num_seqs, -(-longest // block_size)), np.int32)
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

    def learn(self, slot: int, token_ids: Sequence[int]) -> None:
        """The host knows these tokens, which the slot's sequence goes on with."""
        start = self.num_tokens[slot]
        self.token_ids[slot, start : start + len(token_ids)] = token_ids
        self.num_tokens[slot] += len(token_ids)

    def remember(self, slots: Sequence[int], ids: Tensor) -> None:
        """The tokens ids [n] int64 were drawn for these slots."""
        (index,) = upload([np.array(slots, np.int64)], self.device)
        self.last_token.index_copy_(0, index, ids)

    def places(self, slots: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Where in the cache the tokens of these indices in their sequences are, for [N] pairs."""
        return places(self.block_table, slots, indices, self.block_size)

    def lay_out(self, rows: Sequence[Row], trees: Mapping[int, DraftTree] = NO_TREES) -> Rows:
        """These rows laid end to end in their order; trees: of rows by their number, what is guessed in them."""
        slots, starts, counts = np.array(
            [[row.slot for row in rows], [row.start for row in rows], [row.num_tokens for row in rows]]
        )
        branching = {i: rows_of(tree) for i, tree in trees.items() if not tree.is_chain}
        layout = lay_out(self.block_table, slots, starts, counts, self.block_size, branching)
        input_ids = self.token_ids[slots[layout.sequence], layout.indices]
        for i, tree in trees.items():
            first = layout.cu_q[i] + 1
            input_ids[first : first + len(tree.tokens)] = tree.tokens
        sources = np.where(starts >= self.num_tokens[slots], slots, KNOWN)
        return Rows(layout, input_ids, sources, starts, counts)

    def gather(
        self, rows: Sequence[Row], logit_rows: Sequence[int], trees: Mapping[int, DraftTree] = NO_TREES
    ) -> RaggedBatch:
        """The batch of these rows, laid end to end in their order; see `lay_out`."""
        layout, input_ids, sources, starts, counts = self.lay_out(rows, trees)
        drawn = np.flatnonzero(sources >= 0)
        at, of = layout.cu_q[drawn].astype(np.int64), sources[drawn]
        *tensors, at, of = upload([input_ids, *layout.arrays, np.array(logit_rows, np.int64), at, of], self.device)
        batch = batch_of(layout, tensors)
        batch.shared = find_shared_prefixes(layout.block_table, counts, starts, self.block_size)
        if len(drawn) == batch.num_tokens:
            batch.input_ids = self.last_token.index_select(0, of)
        elif len(drawn):
            batch.input_ids.index_copy_(0, at, self.last_token.index_select(0, of))
        return batch


def rows_of(tree: DraftTree) -> Parents:
    """The rows that verify a tree, the last real token's first."""
    return [-1, *(parent + 1 for parent in tree.parents)]
