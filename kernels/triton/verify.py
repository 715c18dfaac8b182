"""Verification of drafted trees: a walk per tree, then the token after it, drawn side by side over the vocabulary.

    walk    (trees,)           down from the root; a pass over V only where a sibling is rejected
    bonus   (trees, chunks)    the best of log p + Gumbel noise per chunk, p being what the walk left
    choose  (trees,)           the best of the chunks

The residual is never stored. At a node with children x_1 .. x_j rejected so far it is, column by column,

    r ← p;   for each rejected i:  r ← (r / m_i - q / n_i)_+ , and q at x_i ← 0

where m_i is the mass of r before and n_i the mass that q had left. So a walk keeps three numbers per rejected child (m,
n, x), a rejection reads p and q once to find the next m, and a chain, which rejects at most once, is read once in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .noise import ACCEPT, BONUS, gumbel_of, uniform_at
from .order import chunk_of, id_of, order_key
from .shortlist import row_best
from .specialization import Specialization
from .support import on_gpu

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _at(vector, index, NODES: tl.constexpr):
    """One element of a vector in registers."""
    return tl.sum(tl.where(tl.arange(0, NODES) == index, vector, 0), axis=0)


@triton.jit
def _put(vector, index, value, NODES: tl.constexpr):
    return tl.where(tl.arange(0, NODES) == index, value, vector)


@triton.jit
def residual(p, q, ids, tried, masses, drafts, rejected, NODES: tl.constexpr):
    """What p has become, unnormalised, and what is left of q, at columns ids; see the module.

    tried: rejected children of the node. masses, drafts, rejected [NODES]: m_i, n_i and x_i of each; n_i = inf where
    rounding left no residual, and then p stays as it was.
    """
    for i in range(0, tried):
        n = _at(drafts, i, NODES)
        p = tl.maximum(tl.div_rn(p, _at(masses, i, NODES)) - tl.div_rn(q, n), 0.0)
        q = tl.where(ids == _at(rejected, i, NODES), 0.0, q)
    return p, q


@triton.jit
def masses_left(p_line, q_line, tried, masses, drafts, rejected, V, NODES: tl.constexpr, TILE: tl.constexpr):
    """The sums of both residuals over the vocabulary: one pass over a row of p and of q."""
    p_sums, q_sums = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for start in range(0, V, TILE):
        ids = start + tl.arange(0, TILE)
        p = tl.load(p_line + ids, mask=ids < V, other=0.0)
        q = tl.load(q_line + ids, mask=ids < V, other=0.0)
        p, q = residual(p, q, ids, tried, masses, drafts, rejected, NODES)
        p_sums += p
        q_sums += q
    return tl.sum(p_sums, axis=0), tl.sum(q_sums, axis=0)


@triton.jit
def walk(
    target,
    draft,
    tokens,
    parents,
    seeds,
    sample_index,
    positions,
    accepted,
    ends,
    masses_out,
    drafts_out,
    rejected_out,
    N,
    V,
    NODES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tree: which rows are accepted, and the state at its end: (row, depth, children rejected there)."""
    tree = tl.program_id(0).to(tl.int64)
    seed, index, position = tl.load(seeds + tree), tl.load(sample_index + tree), tl.load(positions + tree)
    p_rows, q_rows = target + tree * N * V, draft + tree * N * V
    current, depth, tried = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int32)
    # m and n of the next child to be judged: nothing is taken from p and q at first.
    mass, left = tl.full((), 1.0, tl.float32), tl.full((), 1.0, tl.float32)
    masses, drafts = tl.full((NODES,), 1.0, tl.float32), tl.full((NODES,), 1.0, tl.float32)
    rejected = tl.full((NODES,), -1, tl.int64)
    tl.store(accepted + tree * N, 0)
    for row in range(1, N):
        taken = current < 0
        if tl.load(parents + tree * N + row) == current:
            x = tl.load(tokens + tree * N + row)
            p_line, q_line = p_rows + current * V, q_rows + current * V
            p, q = residual(tl.load(p_line + x), tl.load(q_line + x), x, tried, masses, drafts, rejected, NODES)
            u = uniform_at(seed, index, position + depth, ACCEPT, tried)
            taken = u * tl.div_rn(q, left) < tl.div_rn(p, mass)
            if taken:
                current, depth, tried = current * 0 + row, depth + 1, tried * 0
                mass, left = mass * 0 + 1.0, left * 0 + 1.0
            else:
                masses = _put(masses, tried, mass, NODES)
                drafts = _put(drafts, tried, left, NODES)
                rejected = _put(rejected, tried, x, NODES)
                tried += 1
                remains, rest = masses_left(p_line, q_line, tried, masses, drafts, rejected, V, NODES, TILE)
                # Where rounding leaves nothing, p and q are equal up to rounding, and p itself is as good.
                drafts = _put(drafts, tried - 1, tl.where(remains > 0, left, float("inf")), NODES)
                mass = tl.where(remains > 0, remains, 1.0)
                left = tl.maximum(rest, _TINY)
        tl.store(accepted + tree * N + row, taken.to(tl.int8))
    node = tl.arange(0, NODES)
    tl.store(masses_out + tree * NODES + node, masses)
    tl.store(drafts_out + tree * NODES + node, drafts)
    tl.store(rejected_out + tree * NODES + node, rejected)
    tl.store(ends + tree * 3, current)
    tl.store(ends + tree * 3 + 1, depth)
    tl.store(ends + tree * 3 + 2, tried.to(tl.int64))


@triton.jit
def bonus(
    target,
    draft,
    seeds,
    sample_index,
    positions,
    ends,
    masses,
    drafts,
    rejected,
    best,
    N,
    V,
    NODES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The key of a chunk's winner. The residual's scale is the same for all columns and is left out."""
    tree, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    current, depth = tl.load(ends + tree * 3), tl.load(ends + tree * 3 + 1)
    tried = tl.load(ends + tree * 3 + 2).to(tl.int32)
    line = (tree * N + current) * V
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    node = tree * NODES + tl.arange(0, NODES)
    p = tl.load(target + line + ids, mask=ids < V, other=0.0)
    if tried > 0:
        q = tl.load(draft + line + ids, mask=ids < V, other=0.0)
        p, _ = residual(
            p, q, ids, tried, tl.load(masses + node), tl.load(drafts + node), tl.load(rejected + node), NODES
        )
    seed, index, position = tl.load(seeds + tree), tl.load(sample_index + tree), tl.load(positions + tree)
    quads = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    g = gumbel_of(seed, index, position + depth, BONUS, quads)
    score = tl.where(p > 0, tl.log(tl.where(p > 0, p, 1.0)) + g, -float("inf"))
    tl.store(best + tree * tl.num_programs(1) + chunk, tl.max(order_key(score, ids), axis=0))


@triton.jit
def choose(best, last, chunks, CHUNKS: tl.constexpr):
    tree = tl.program_id(0).to(tl.int64)
    tl.store(last + tree, id_of(row_best(best, tree, chunks, CHUNKS)).to(tl.int64))


# A walk has a processor to itself, and its passes are a stream of two rows: 32 KB in flight.
_TILE = 4096


@implements("verify", "triton", when=on_gpu)
def verify(
    target: Tensor,
    draft: Tensor,
    tokens: Tensor,
    parents: Tensor,
    seeds: Tensor,
    sample_index: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """See the reference. target and draft are contiguous; only rows on a tree's path are read."""
    trees, count, vocab = target.shape
    device = target.device
    accepted = torch.empty(trees, count, dtype=torch.bool, device=device)
    last = torch.empty(trees, dtype=torch.int64, device=device)
    if trees == 0:
        return accepted, last
    chunk = chunk_of(vocab)
    chunks, nodes = triton.cdiv(vocab, chunk), triton.next_power_of_2(count)
    ends = torch.empty(trees, 3, dtype=torch.int64, device=device)
    masses, drafts = torch.empty(trees, nodes, device=device), torch.empty(trees, nodes, device=device)
    rejected = torch.empty(trees, nodes, dtype=torch.int64, device=device)
    best = torch.empty(trees, chunks, dtype=torch.int64, device=device)
    noise = (seeds.contiguous(), sample_index.contiguous(), positions.contiguous())
    target, draft = target.contiguous(), draft.contiguous()
    walk[(trees,)](
        target,
        draft,
        tokens.contiguous(),
        parents.contiguous(),
        *noise,
        accepted.view(torch.int8),
        ends,
        masses,
        drafts,
        rejected,
        count,
        vocab,
        NODES=nodes,
        TILE=min(_TILE, chunk),
        num_warps=16,
    )
    bonus[(trees, chunks)](
        target,
        draft,
        *noise,
        ends,
        masses,
        drafts,
        rejected,
        best,
        count,
        vocab,
        NODES=nodes,
        CHUNK=chunk,
        num_warps=8,
    )
    choose[(trees,)](best, last, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1)
    return accepted, last


def specializations() -> list[Specialization]:
    """The forms that are compiled ahead of time: a vocabulary of 128k, chains of 4 drafts and trees of 31."""
    vocab = 128_256
    chunk = chunk_of(vocab)
    both = {"target": "*fp32:16", "draft": "*fp32:16"}
    noise = {"seeds": "*i64:16", "sample_index": "*i64:16", "positions": "*i64:16"}
    state = {"masses": "*fp32:16", "drafts": "*fp32:16", "rejected": "*i64:16"}
    forms = []
    for nodes in (8, 32):
        forms += [
            Specialization(
                f"walk/{nodes}",
                walk,
                both
                | {"tokens": "*i64:16", "parents": "*i64:16"}
                | noise
                | {"accepted": "*i8:16", "ends": "*i64:16"}
                | {f"{name}_out": kind for name, kind in state.items()}
                | {"N": "i32", "V": "i32:16"},
                {"NODES": nodes, "TILE": min(_TILE, chunk)},
                num_warps=16,
                needs=("wide",),
            ),
            Specialization(
                f"bonus/{nodes}",
                bonus,
                both | noise | {"ends": "*i64:16"} | state | {"best": "*i64:16", "N": "i32", "V": "i32:16"},
                {"NODES": nodes, "CHUNK": chunk},
                num_warps=8,
                needs=("wide",),
            ),
        ]
    chunks = triton.cdiv(vocab, chunk)
    return [
        *forms,
        Specialization(
            "choose",
            choose,
            {"best": "*i64:16", "last": "*i64:16", "chunks": "i32:16"},
            {"CHUNKS": triton.next_power_of_2(chunks)},
            num_warps=1,
        ),
    ]
