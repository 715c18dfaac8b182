"""The largest logit of each row: chunks of the row side by side, then the best of the chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .order import chunk_of, id_of, order_key
from .specialization import Specialization
from .support import on_gpu


@triton.jit
def chunk_best(logits, stride, best, V, CHUNK: tl.constexpr):
    """The first key of a chunk. Grid (rows, chunks)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * stride + ids, mask=ids < V, other=-float("inf"))
    tl.store(best + row * tl.num_programs(1) + chunk, tl.max(order_key(values, ids), axis=0))


@triton.jit
def row_best(logits, stride, best, values, ids, chunks, CHUNKS: tl.constexpr):
    """The first of a row's chunks. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    of_chunk = tl.arange(0, CHUNKS)
    # A chunk that is not there repeats the first one.
    token = id_of(tl.max(tl.load(best + row * chunks + tl.where(of_chunk < chunks, of_chunk, 0)), axis=0))
    tl.store(ids + row, token.to(tl.int64))
    tl.store(values + row, tl.load(logits + row * stride + token))


@implements("greedy", "triton", when=on_gpu)
def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference. One pass over the logits."""
    rows, vocab = logits.shape
    chunk = chunk_of(vocab)
    chunks = triton.cdiv(vocab, chunk)
    best = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    values = torch.empty(rows, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows > 0:
        chunk_best[(rows, chunks)](logits, logits.stride(0), best, vocab, CHUNK=chunk, num_warps=8)
        row_best[(rows,)](
            logits, logits.stride(0), best, values, ids, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1
        )
    return values, ids


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: a vocabulary of 128k."""
    return [
        Specialization(
            name="chunk_best",
            kernel=chunk_best,
            signature={"logits": "*fp32:16", "stride": "i32:16", "best": "*i64:16", "V": "i32:16"},
            constexprs={"CHUNK": chunk_of(128_256)},
            num_warps=8,
            needs=("wide",),
        ),
        Specialization(
            name="row_best",
            kernel=row_best,
            signature={
                "logits": "*fp32:16",
                "stride": "i32:16",
                "best": "*i64:16",
                "values": "*fp32:16",
                "ids": "*i64:16",
                "chunks": "i32:16",
            },
            constexprs={"CHUNKS": 32},
            num_warps=1,
        ),
    ]
