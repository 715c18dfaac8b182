"""The one shape in which work reaches a model: sequences laid end to end, each with its own length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_formats import KVFormat, kv_format

# Rows of a sequence up to which attention splits its keys over programs: decodes, and verifications of up to 15 drafts.
SHORT_ROWS = 16


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

    max_q, max_seq_len, short_seqs: host ints, for grids and buffers only, never for semantics.
    short_seqs: so many leading sequences have at most SHORT_ROWS rows each; any smaller number is as right.
    shared: what block_table says already, found once for all layers; a sequence is in one group at most. Attention may
    use it to read less; its results are those of a batch without it, on a CPU bit by bit, on a GPU up to rounding.
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
    short_seqs: int = 0
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
    format: str  # a name in kv_formats.py

    @property
    def coding(self) -> KVFormat:
        return kv_format(self.format)

    @property
    def block_bytes(self) -> int:
        """Of the keys and values of one block of one layer, with their scales."""
        return 2 * self.block_size * self.num_kv_heads * self.coding.bytes_per_head(self.head_dim)


@dataclass(slots=True)
class LayerKV:
    """One layer's paged keys and values. Pages never travel without their scales (see kv_formats.py)."""

    spec: KVSpec
    k: Tensor  # [num_blocks, block_size, num_kv_heads, width]
    v: Tensor  # [num_blocks, block_size, num_kv_heads, width]
    k_scale: Tensor | None = None  # None; [num_kv_heads] fp32; or [num_blocks, block_size, num_kv_heads]
    v_scale: Tensor | None = None

    @property
    def per_slot(self) -> tuple[Tensor, ...]:
        """Every tensor that has an entry per slot, [num_blocks, block_size, ...]: what moves when a slot moves."""
        scales = (self.k_scale, self.v_scale) if self.spec.coding.scale == "token" else ()
        return (self.k, self.v, *(scale for scale in scales if scale is not None))


def allocate_layer(spec: KVSpec, num_blocks: int, device: torch.device | str) -> LayerKV:
    """An empty cache. Zeroed pages are mapped on first use, so unused blocks cost no memory on the CPU.

    Static scales are 1 until the checkpoint says otherwise.
    """
    coding = spec.coding
    slots = (num_blocks, spec.block_size, spec.num_kv_heads)

    def pages() -> Tensor:
        return torch.zeros(*slots, coding.width(spec.head_dim), dtype=coding.storage, device=device)

    def scales() -> Tensor | None:
        if coding.scale == "none":
            return None
        if coding.scale == "static":
            return torch.ones(spec.num_kv_heads, dtype=torch.float32, device=device)
        return torch.zeros(slots, dtype=coding.scale_dtype, device=device)

    return LayerKV(spec, pages(), pages(), scales(), scales())
