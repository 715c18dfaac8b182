"""Changes to logits: one lane per (row, column) pair, or per column of a mask; one kernel per kind, in the reference's
order.

Pairs of one kind are distinct or say the same thing, so the scatters need no atomics. A pair of one kind may meet a
pair of another at the same logit: the kinds are launches of their own, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.sampling import LogitEdits
from ..registry import implements
from .order import chunk_of
from .specialization import Specialization
from .support import on_gpu

_PAIRS = 256  # per program: a step has some thousands of pairs at most, and they should spread


@triton.jit
def _places(rows, columns, count, V, BLOCK: tl.constexpr):
    """This program's pairs: their numbers, which exist, the rows, and the offsets of their logits."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < count
    row = tl.load(rows + pair, mask=inside, other=0)
    return pair, inside, row, row * V + tl.load(columns + pair, mask=inside, other=0)


@triton.jit
def penalise(logits, rows, columns, repetition, subtracted, count, V, BLOCK: tl.constexpr):
    pair, inside, _, place = _places(rows, columns, count, V, BLOCK)
    x = tl.load(logits + place, mask=inside, other=0.0)
    r = tl.load(repetition + pair, mask=inside, other=1.0)
    less = tl.load(subtracted + pair, mask=inside, other=0.0)
    tl.store(logits + place, tl.where(x > 0, tl.div_rn(x, r), x * r) - less, mask=inside)


@triton.jit
def add_bias(logits, rows, columns, values, count, V, BLOCK: tl.constexpr):
    pair, inside, _, place = _places(rows, columns, count, V, BLOCK)
    x = tl.load(logits + place, mask=inside, other=0.0)
    tl.store(logits + place, x + tl.load(values + pair, mask=inside, other=0.0), mask=inside)


@triton.jit
def ban(logits, rows, columns, count, V, BLOCK: tl.constexpr):
    _, inside, _, place = _places(rows, columns, count, V, BLOCK)
    tl.store(logits + place, tl.full((BLOCK,), -float("inf"), tl.float32), mask=inside)


@triton.jit
def take_allowed(logits, rows, columns, kept, named, count, V, BLOCK: tl.constexpr):
    """Note the allowed logits and the rows that have an allow list."""
    pair, inside, row, place = _places(rows, columns, count, V, BLOCK)
    tl.store(kept + pair, tl.load(logits + place, mask=inside, other=0.0), mask=inside)
    tl.store(named + row, tl.full((BLOCK,), 1, tl.int32), mask=inside)


@triton.jit
def empty_rows(logits, named, V, CHUNK: tl.constexpr):
    """Set the named rows to -inf. Grid (rows, chunks); a row that is not named costs one load."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(named + row) != 0:
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        tl.store(logits + row * V + ids, tl.full((CHUNK,), -float("inf"), tl.float32), mask=ids < V)


@triton.jit
def put_allowed(logits, rows, columns, kept, count, V, BLOCK: tl.constexpr):
    pair, inside, _, place = _places(rows, columns, count, V, BLOCK)
    tl.store(logits + place, tl.load(kept + pair, mask=inside, other=0.0), mask=inside)


@triton.jit
def keep_masked(logits, rows, bits, V, words, CHUNK: tl.constexpr):
    """Set to -inf what has no bit. Grid (masks, chunks); a chunk is a multiple of 32 columns."""
    mask = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    word = tl.load(bits + mask * words + ids // 32, mask=ids < V, other=0)
    out = (ids < V) & (((word >> (ids % 32)) & 1) == 0)
    row = tl.load(rows + mask)
    tl.store(logits + row * V + ids, tl.full((CHUNK,), -float("inf"), tl.float32), mask=out)


@implements("process_logits", "triton", when=on_gpu)
def process_logits(logits: Tensor, edits: LogitEdits) -> Tensor:
    """See the reference. One copy of the logits; what follows touches the pairs, and rows with allow lists or masks."""
    logits = logits.clone(memory_format=torch.contiguous_format)
    vocab = logits.shape[-1]

    def each_pair(kernel: triton.JITFunction, kind: tuple[Tensor, ...], *more: Tensor) -> None:
        count = len(kind[0])
        if count > 0:
            kernel[(triton.cdiv(count, _PAIRS),)](logits, *kind, *more, count, vocab, BLOCK=_PAIRS)

    if edits.penalties is not None:
        each_pair(penalise, edits.penalties)
    if edits.bias is not None:
        each_pair(add_bias, edits.bias)
    if edits.banned is not None:
        each_pair(ban, edits.banned)
    if edits.allowed is not None:
        kept = torch.empty(len(edits.allowed.rows), device=logits.device)
        named = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
        chunk = chunk_of(vocab)
        each_pair(take_allowed, edits.allowed, kept, named)
        empty_rows[(len(logits), triton.cdiv(vocab, chunk))](logits, named, vocab, CHUNK=chunk, num_warps=8)
        each_pair(put_allowed, edits.allowed, kept)
    if edits.masks is not None and len(edits.masks.rows) > 0:
        rows, bits = edits.masks
        chunk = chunk_of(vocab)
        grid = (len(rows), triton.cdiv(vocab, chunk))
        keep_masked[grid](logits, rows, bits.contiguous(), vocab, bits.shape[1], CHUNK=chunk, num_warps=8)
    return logits


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time."""
    pairs = {"logits": "*fp32:16", "rows": "*i64:16", "columns": "*i64:16"}
    sizes = {"count": "i32", "V": "i32:16"}
    more: dict[triton.JITFunction, dict[str, str]] = {
        penalise: {"repetition": "*fp32:16", "subtracted": "*fp32:16"},
        add_bias: {"values": "*fp32:16"},
        ban: {},
        take_allowed: {"kept": "*fp32:16", "named": "*i32:16"},
        put_allowed: {"kept": "*fp32:16"},
    }
    return [
        Specialization(kernel.__name__, kernel, pairs | tensors | sizes, {"BLOCK": _PAIRS})
        for kernel, tensors in more.items()
    ] + [
        Specialization(
            "empty_rows",
            empty_rows,
            {"logits": "*fp32:16", "named": "*i32:16", "V": "i32:16"},
            {"CHUNK": chunk_of(128_256)},
            num_warps=8,
        ),
        Specialization(
            "keep_masked",
            keep_masked,
            {"logits": "*fp32:16", "rows": "*i64:16", "bits": "*i32:16", "V": "i32:16", "words": "i32"},
            {"CHUNK": chunk_of(128_256)},
            num_warps=8,
        ),
    ]
