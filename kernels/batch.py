"""The one shape in which work reaches a model: sequences laid end to end, each with its own length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Sequences that begin with the same blocks, so that these can be read once for all of them."""

    seqs: tuple[int, ...]
    num_blocks: int  # full blocks, before the first row of any of the sequences in this step


@dataclass(slots=True)
class RaggedBatch:
    """T tokens of S sequences. A decode is q = 1, a prompt chunk q = n, a verification q = 1 + drafts.

    Visibility of key position p for a query row at offset i in a sequence with context c = seq_len - q:
    p < c always; else, if tree_mask of the row is 0, p - c <= i; else bit (p - c) of tree_mask (bit 0 = row 0).

    max_q, max_seq_len: host ints, for grids and buffers only, never for semantics.
    shared: what block_table says already, found once for all layers; a sequence is in one group at most. Attention may
    use it to read less, and its results are those of a batch without it.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64: block * block_size + offset where the token's K/V goes
    cu_q: Tensor  # [S + 1] int32: the rows of sequence s are cu_q[s] .. cu_q[s + 1] - 1
    seq_lens: Tensor  # [S] int32: context and this step's tokens
    block_table: Tensor  # [S, B] int32, rows padded with block 0
    tree_mask: Tensor | None  # [T] int64, or None when no row belongs to a tree
    logit_rows: Tensor  # [L] int64: the rows whose logits are needed
    max_q: int
    max_seq_len: int
    shared: tuple[SharedPrefix, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The shape of one layer's cache. Block 0 is the null block: padding writes go there and nothing reads it."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    format: str  # "bf16", "fp16", "fp32"; quantized formats carry scales beside the values

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.format]


@dataclass(slots=True)
class LayerKV:
    """One layer's paged keys and values."""

    spec: KVSpec
    k: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
