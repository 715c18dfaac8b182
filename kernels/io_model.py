"""How many bytes attention over few rows must move, and how many the launch moves: the limit a decode step is held to.

    B_min = Σ over sequences of visible keys and values with their scales + queries + outputs + block table

A launch moves more: whole sectors where it needs parts of them, and partial results where a sequence's keys are split
over programs. These are counts; Saha and Ye 2024 (arXiv 2402.07443) have the asymptotic bounds for many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .batch import KVSpec

SECTOR = 32  # bytes: what a GPU fetches at least (CUDA C Best Practices Guide, coalesced access)
PAGE_ENTRY = 4  # bytes of a block_table entry


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of one layer's attention, by what they are."""

    codes: int  # keys and values
    scales: int
    rows: int  # queries read and outputs written
    table: int  # block table
    splits: int  # partial results, written and read again

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.rows + self.table + self.splits


def compulsory(
    spec: KVSpec, seq_lens: Sequence[int], q_lens: Sequence[int], q_heads: int, window: int | None, entry_bytes: int
) -> Moved:
    """What no implementation can do without, for q_lens[s] rows on the last of seq_lens[s] keys.

    entry_bytes: of an entry of q and of the output.
    """
    keys = [visible_keys(n, q, window) for n, q in zip(seq_lens, q_lens, strict=True)]
    pages = [pages_of(n, count, spec.block_size) for n, count in zip(seq_lens, keys, strict=True)]
    coding = spec.coding
    heads = 2 * spec.num_kv_heads * sum(keys)
    codes = coding.width(spec.head_dim) * coding.storage.itemsize
    return Moved(
        codes=heads * codes,
        scales=heads * (coding.bytes_per_head(spec.head_dim) - codes),
        rows=2 * sum(q_lens) * q_heads * spec.head_dim * entry_bytes,
        table=PAGE_ENTRY * sum(pages),
        splits=0,
    )


def launched(
    spec: KVSpec,
    seq_lens: Sequence[int],
    q_lens: Sequence[int],
    q_heads: int,
    window: int | None,
    entry_bytes: int,
    segments: Sequence[int],
) -> Moved:
    """What the kernel for few rows moves: each KV head's program reads each visible key once, in whole sectors.

    segments: over how many programs each sequence's keys are split; with more than one, every program leaves
    D sums, a maximum and a denominator per row and head in fp32, which the reduction reads.
    """
    least = compulsory(spec, seq_lens, q_lens, q_heads, window, entry_bytes)
    coding = spec.coding
    stride = coding.width(spec.head_dim) * coding.storage.itemsize
    parts = sum(s * q for s, q in zip(segments, q_lens, strict=True) if s > 1)
    return Moved(
        codes=least.codes // stride * in_sectors(stride),
        scales=_scale_sectors(spec, seq_lens, q_lens, window),
        rows=least.rows,
        table=least.table * spec.num_kv_heads,
        splits=2 * 4 * (spec.head_dim + 2) * q_heads * parts,
    )


def visible_keys(seq_len: int, q_len: int, window: int | None) -> int:
    """Keys that at least one of a sequence's last q_len rows sees."""
    if seq_len == 0 or q_len == 0:
        return 0
    return seq_len if window is None else min(seq_len, window + q_len - 1)


def pages_of(seq_len: int, keys: int, block_size: int) -> int:
    """Blocks that the last `keys` of a sequence's keys lie in."""
    if keys == 0:
        return 0
    return (seq_len - 1) // block_size - (seq_len - keys) // block_size + 1


def in_sectors(stride: int) -> int:
    """Bytes fetched for the entries of one head, which begin at multiples of `stride`; neighbours are other heads'.

    Where the stride is no multiple of a sector the neighbours' programs fetch the same sectors from the L2 cache.
    """
    return stride if stride % SECTOR == 0 else -(-stride // SECTOR) * SECTOR


def _scale_sectors(spec: KVSpec, seq_lens: Sequence[int], q_lens: Sequence[int], window: int | None) -> int:
    """Scales [slots, Hk] are one run per page; each head's program takes its column, all but the first from L2."""
    if spec.coding.scale != "token":
        return 0
    entry = spec.coding.scale_dtype.itemsize * spec.num_kv_heads
    total = 0
    for seq_len, q_len in zip(seq_lens, q_lens, strict=True):
        keys = visible_keys(seq_len, q_len, window)
        first = seq_len - keys
        while first < seq_len:
            end = min(seq_len, (first // spec.block_size + 1) * spec.block_size)
            start, stop = first % spec.block_size * entry, ((end - 1) % spec.block_size + 1) * entry
            total += 2 * (-(-stop // SECTOR) - start // SECTOR) * SECTOR
            first = end
    return total
