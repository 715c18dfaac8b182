"""What the model itself thought: a token's log-probability, its rank and its best rivals.

    summarise_rows  (rows, chunks)   per chunk: best key and mass; group maxima where rivals are asked for
    head_rows       (rows,)          log of the mass, the token's logprob, the groups that can hold a rival
    rank_chunks     (rows, chunks)   how many tokens of a chunk are likelier: the second pass over the logits
    rival_rows      (rows,)          the k-th key by search, and the k keys from there on; a sort of k keys follows

Values are (logit - largest) - log(mass) throughout, rounded in this order, so equal tokens give equal log-probabilities
wherever they are computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.sampling import Logprobs
from ..registry import implements
from .cut import TILE, load_shortlisted, lowest_key, search
from .order import BEFORE_ALL, ID_SPAN, chunk_of, value_of
from .shortlist import (
    GROUP,
    load_chunk,
    load_leaders,
    reached,
    row_best,
    row_mass,
    sound,
    summarise,
    write_shortlist,
)
from .specialization import Specialization
from .support import on_gpu

# More rivals than this are rarely asked for, and with k near the number of groups the shortlist is the whole row: a
# sort serves them.
_MOST_RIVALS = 128


@triton.jit
def summarise_rows(logits, stride, best, masses, leaders, V, groups, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.num_programs(1)
    values, _, key = load_chunk(logits, stride, row, chunk, V, CHUNK)
    tl.store(best + row * chunks + chunk, key)
    top = value_of(key)
    values = tl.where(sound(top), values, -float("inf"))
    top = tl.where(sound(top), top, 0.0)
    summarise(values, top, 1.0, masses, leaders, row, chunk, chunks, groups, CHUNK)


@triton.jit
def head_rows(
    logits,
    stride,
    tokens,
    best,
    masses,
    leaders,
    shortlist,
    count,
    floors,
    tops,
    shifts,
    logprobs,
    V,
    chunks,
    groups,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A row's largest logit, log of its mass and the token's logprob; NaN in an unsound row, with no group live."""
    row = tl.program_id(0).to(tl.int64)
    top = value_of(row_best(best, row, chunks, CHUNKS))
    if sound(top):
        shift = tl.log(row_mass(best, masses, row, top, 1.0, chunks, CHUNKS))
        own = tl.load(logits + row * stride + tl.load(tokens + row))
        tl.store(tops + row, top)
        tl.store(shifts + row, shift)
        tl.store(logprobs + row, (own - top) - shift)
        if K > 0:
            maxima, group, inside = load_leaders(leaders, row, groups, GROUPS)
            x = (maxima - top) - shift
            floor = reached(x, inside.to(tl.float32), K)
            write_shortlist(x, floor, group, inside, shortlist, count, floors, row, groups)
    else:
        tl.store(tops + row, 0.0)
        tl.store(shifts + row, float("nan"))
        tl.store(logprobs + row, float("nan"))
        tl.store(count + row, 0)


@triton.jit
def rank_chunks(logits, stride, tops, shifts, logprobs, likelier, V, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    values, _, _ = load_chunk(logits, stride, row, chunk, V, CHUNK)
    x = (values - tl.load(tops + row)) - tl.load(shifts + row)
    more = tl.sum((x > tl.load(logprobs + row)).to(tl.int32), axis=0)
    tl.store(likelier + row * tl.num_programs(1) + chunk, more)


@triton.jit
def rival_rows(
    logits,
    stride,
    shortlist,
    count,
    floors,
    tops,
    shifts,
    likelier,
    ranks,
    rivals,
    V,
    chunks,
    groups,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row's rank, and the keys of its K first tokens in the order of their ids."""
    row = tl.program_id(0).to(tl.int64)
    of_chunk = tl.arange(0, CHUNKS)
    more = tl.load(likelier + row * chunks + of_chunk, mask=of_chunk < chunks, other=0)
    tl.store(ranks + row, 1 + tl.sum(more, axis=0).to(tl.int64))
    if K > 0:
        shift = tl.load(shifts + row)
        if shift != shift:
            # All of the row is NaN, so the lower id comes first.
            first = tl.arange(0, TILE)
            tl.store(rivals + row * K + first, -first.to(tl.int64), mask=first < K)
        else:
            line = logits + row * stride
            groups_of_row = shortlist + row * groups
            n, top = tl.load(count + row), tl.load(tops + row)
            cut = lowest_key(tl.load(floors + row))
            cut = search(line, groups_of_row, n, cut, K, top, 1.0, shift, V, True, TILE)
            taken = 0
            for start in range(0, n * GROUP, TILE):
                _, _, keys = load_shortlisted(line, groups_of_row, n, start, top, 1.0, shift, V, TILE)
                kept = (keys >= cut) & (keys > BEFORE_ALL)
                place = taken + tl.cumsum(kept.to(tl.int32), axis=0) - 1
                tl.store(rivals + row * K + place, keys, mask=kept & (place < K))
                taken += tl.sum(kept.to(tl.int32), axis=0)


@implements("token_logprobs", "triton", when=on_gpu)
def token_logprobs(logits: Tensor, ids: Tensor, k: int) -> Logprobs:
    """See the reference. Two passes over the logits; more than 128 rivals cost a sort."""
    rows, vocab = logits.shape
    chunk = chunk_of(vocab)
    chunks, groups = triton.cdiv(vocab, chunk), triton.cdiv(vocab, GROUP.value)
    searched = k if k <= min(_MOST_RIVALS, vocab) else 0

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=logits.device)

    tops, shifts, logprobs = empty(1, torch.float32), empty(1, torch.float32), empty(1, torch.float32)
    ranks, rivals = empty(1, torch.int64), empty(searched, torch.int64)
    if rows > 0:
        best, likelier = empty(chunks, torch.int64), empty(chunks, torch.int32)
        masses, leaders = empty(chunks, torch.float32), empty(groups, torch.float32)
        shortlist, count, floors = empty(groups, torch.int32), empty(1, torch.int32), empty(1, torch.float32)
        line, width = (logits, logits.stride(0)), triton.next_power_of_2(chunks)
        each_chunk, each_row = (rows, chunks), (rows,)
        summarise_rows[each_chunk](*line, best, masses, leaders, vocab, groups, CHUNK=chunk, num_warps=8)
        head_rows[each_row](
            *line,
            ids,
            best,
            masses,
            leaders,
            shortlist,
            count,
            floors,
            tops,
            shifts,
            logprobs,
            vocab,
            chunks,
            groups,
            K=searched,
            CHUNKS=width,
            GROUPS=triton.next_power_of_2(groups),
            num_warps=8,
        )
        rank_chunks[each_chunk](*line, tops, shifts, logprobs, likelier, vocab, CHUNK=chunk, num_warps=8)
        rival_rows[each_row](
            *line,
            shortlist,
            count,
            floors,
            tops,
            shifts,
            likelier,
            ranks,
            rivals,
            vocab,
            chunks,
            groups,
            K=searched,
            CHUNKS=width,
            TILE=TILE.value,
            num_warps=8,
        )
    if searched == k:
        rivals = rivals.sort(dim=1, descending=True).values
        top_ids = -rivals & (ID_SPAN.value - 1)
        top_logprobs = (logits.gather(1, top_ids) - tops) - shifts
    else:
        table = (logits - tops) - shifts
        top_logprobs, top_ids = (x[:, :k] for x in table.sort(dim=1, descending=True, stable=True))
    return Logprobs(logprobs.squeeze(1), ranks.squeeze(1), top_ids, top_logprobs)


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: a vocabulary of 128k, with 20 rivals and with none."""
    vocab = 128_256
    chunk = chunk_of(vocab)
    width = triton.next_power_of_2(triton.cdiv(vocab, chunk))
    line = {"logits": "*fp32:16", "stride": "i32:16"}
    surveyed = {"best": "*i64:16", "masses": "*fp32:16", "leaders": "*fp32:16"}
    listed = {"shortlist": "*i32:16", "count": "*i32:16", "floors": "*fp32:16"}
    head = {"tops": "*fp32:16", "shifts": "*fp32:16"}
    sizes = {"V": "i32:16", "chunks": "i32:16", "groups": "i32"}
    return [
        Specialization(
            "summarise_rows",
            summarise_rows,
            line | surveyed | {"V": "i32:16", "groups": "i32"},
            {"CHUNK": chunk},
            num_warps=8,
            needs=("wide",),
        ),
        Specialization(
            "rank_chunks",
            rank_chunks,
            line | head | {"logprobs": "*fp32:16", "likelier": "*i32:16", "V": "i32:16"},
            {"CHUNK": chunk},
            num_warps=8,
            needs=("wide",),
        ),
        *(
            Specialization(
                f"head_rows/k{k}",
                head_rows,
                line | {"tokens": "*i64:16"} | surveyed | listed | head | {"logprobs": "*fp32:16"} | sizes,
                {"K": k, "CHUNKS": width, "GROUPS": triton.next_power_of_2(triton.cdiv(vocab, GROUP.value))},
                num_warps=8,
            )
            for k in (0, 20)
        ),
        *(
            Specialization(
                f"rival_rows/k{k}",
                rival_rows,
                line | listed | head | {"likelier": "*i32:16", "ranks": "*i64:16", "rivals": "*i64:16"} | sizes,
                {"K": k, "CHUNKS": width, "TILE": TILE.value},
                num_warps=8,
            )
            for k in (0, 20)
        ),
    ]
