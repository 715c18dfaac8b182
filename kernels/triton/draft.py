"""Draws without replacement: the best of every chunk of a row, then the best of these.

    chunk_draws   (rows, chunks)   the first `count` keys of a chunk, the only pass over q
    row_draws     (rows,)          the first `count` of the chunks' keys

A node's noise has columns of its own that begin at node · V: in the middle of a quad where V is no multiple of four.
Chunks then begin with a whole quad, up to three columns before the row does, so that no word is made twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .noise import DRAFT, gumbel_of
from .order import BEFORE_ALL, chunk_of, id_of, order_key, value_of
from .specialization import Specialization
from .support import on_gpu


@triton.jit
def chunk_draws(
    q,
    stride,
    seeds,
    sample_index,
    positions,
    nodes,
    winners,
    V,
    count,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """WHOLE: V is a multiple of four. winners [rows, chunks, count]; BEFORE_ALL where a chunk has no more tokens."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(nodes + row) * V
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    if not WHOLE:
        ids -= (first & 3).to(tl.int32)
    inside = (ids >= 0) & (ids < V)
    p = tl.load(q + row * stride + ids, mask=inside, other=0.0)
    quads = (first >> 2) + chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    seed, index, position = tl.load(seeds + row), tl.load(sample_index + row), tl.load(positions + row)
    g = gumbel_of(seed, index, position, DRAFT, quads)
    score = tl.where(p > 0, tl.log(tl.where(p > 0, p, 1.0)) + g, -float("inf"))
    keys = tl.where(inside, order_key(score, ids), BEFORE_ALL)
    out = winners + (row * tl.num_programs(1) + chunk) * count
    for i in range(0, count):
        best = tl.max(keys, axis=0)
        tl.store(out + i, best)
        keys = tl.where(keys == best, BEFORE_ALL, keys)


@triton.jit
def row_draws(winners, tokens, keys_out, total, count, WIDTH: tl.constexpr):
    """winners: `total` keys for each row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    keys = tl.load(winners + row * total + place, mask=place < total, other=BEFORE_ALL)
    for i in range(0, count):
        best = tl.max(keys, axis=0)
        tl.store(tokens + row * count + i, id_of(best).to(tl.int64))
        tl.store(keys_out + row * count + i, value_of(best))
        keys = tl.where(keys == best, BEFORE_ALL, keys)


@implements("draw_children", "triton", when=on_gpu)
def draw_children(
    q: Tensor, count: int, seeds: Tensor, sample_index: Tensor, positions: Tensor, nodes: Tensor
) -> tuple[Tensor, Tensor]:
    """See the reference; rows may be strided. One pass over q; each further token costs a maximum of what it holds."""
    rows, vocab = q.shape
    if not 1 <= count <= vocab:
        raise ValueError(f"draw_children: {count} of {vocab} tokens cannot be drawn")
    tokens = torch.empty(rows, count, dtype=torch.int64, device=q.device)
    keys = torch.empty(rows, count, device=q.device)
    if rows > 0:
        chunk, whole = chunk_of(vocab), vocab % 4 == 0
        chunks = triton.cdiv(vocab if whole else vocab + 3, chunk)
        winners = torch.empty(rows, chunks, count, dtype=torch.int64, device=q.device)
        chunk_draws[(rows, chunks)](
            q,
            q.stride(0),
            seeds.contiguous(),
            sample_index.contiguous(),
            positions.contiguous(),
            nodes.contiguous(),
            winners,
            vocab,
            count,
            CHUNK=chunk,
            WHOLE=whole,
            num_warps=8,
        )
        total = chunks * count
        row_draws[(rows,)](
            winners, tokens, keys, total, count, WIDTH=triton.next_power_of_2(total), num_warps=1 if total <= 128 else 4
        )
    return tokens, keys


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: vocabularies of 128k and an odd one, chains and trees."""
    drawn = {"seeds": "*i64:16", "sample_index": "*i64:16", "positions": "*i64:16", "nodes": "*i64:16"}
    forms = []
    for name, vocab, size in (("whole", 128_256, "i32:16"), ("odd", 50_257, "i32")):
        chunk = chunk_of(vocab)
        forms += [
            Specialization(
                f"chunk_draws/{name}/{count}",
                chunk_draws,
                {"q": "*fp32:16", "stride": size}
                | drawn
                | {"winners": "*i64:16", "V": size}
                | ({} if count == 1 else {"count": "i32"}),
                {"CHUNK": chunk, "WHOLE": vocab % 4 == 0} | ({"count": 1} if count == 1 else {}),
                num_warps=8,
                needs=("wide",) if vocab % 4 == 0 else (),
            )
            for count in (1, 4)
        ]
    chunks = triton.cdiv(128_256, chunk_of(128_256))
    return [
        *forms,
        *(
            Specialization(
                f"row_draws/{count}",
                row_draws,
                {"winners": "*i64:16", "tokens": "*i64:16", "keys_out": "*fp32:16", "total": "i32:16"}
                | ({} if count == 1 else {"count": "i32"}),
                {"WIDTH": triton.next_power_of_2(chunks * count)} | ({"count": 1} if count == 1 else {}),
                num_warps=1 if chunks * count <= 128 else 4,
            )
            for count in (1, 4)
        ),
    ]
