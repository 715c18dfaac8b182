"""What the kernel tests share: inputs, tolerances, poison, and every registered implementation as a parameter.

An implementation is tested by being registered. On a machine that lacks its device its cases are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import KVSpec, LayerKV, RaggedBatch, allocate_layer
from .registry import Implementation, Target, implementations

# Relative and absolute: a few roundings of values of order one. bf16 keeps 8 bits, fp16 11, fp32 24 and is summed
# in another order than the reference does.
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NAN = float("nan")


def cases(
    op_name: str, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
) -> list[tuple[str, torch.dtype]]:
    """(implementation, dtype) for every implementation this machine can run, the reference included."""
    return [
        (name, dtype)
        for name, implementation in implementations(op_name).items()
        for dtype in dtypes
        if implementation.when(Target(device_of(name), dtype, 64, FORMATS[dtype])) is None
    ]


def challengers(op_name: str) -> list[tuple[str, torch.dtype]]:
    """The cases that can be held against the reference: all but its own."""
    return [case for case in cases(op_name) if case[0] != "reference"]


def device_of(implementation: str) -> str:
    """Where the inputs of an implementation live in a test."""
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def pair(op_name: str, name: str) -> tuple[Implementation, Implementation]:
    """The named implementation of an op, and its oracle."""
    return implementations(op_name)[name], implementations(op_name)["reference"]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal within the dtype's tolerance; infinities must agree and NaN never does."""
    torch.testing.assert_close(actual.float(), expected.float(), **TOLERANCE[dtype])


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_batch(q_lens: Sequence[int], contexts: Sequence[int], block_size: int, seed: int = 0) -> RaggedBatch:
    """Sequences of q_lens[s] rows on contexts[s] keys, over blocks in random order. Block 0 is nobody's."""
    seq_lens = [q + c for q, c in zip(q_lens, contexts, strict=True)]
    counts = [-(-n // block_size) for n in seq_lens]
    shuffled = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1
    table = torch.zeros(len(counts), max([1, *counts]), dtype=torch.int32)
    for row, blocks in zip(table, shuffled.split(counts), strict=True):
        row[: len(blocks)] = blocks
    positions = [torch.arange(c, c + q) for q, c in zip(q_lens, contexts, strict=True)]
    slots = [row.long()[p // block_size] * block_size + p % block_size for row, p in zip(table, positions, strict=True)]
    tokens = sum(q_lens)
    return RaggedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64),
        slot_mapping=torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64),
        cu_q=torch.tensor([0, *q_lens]).cumsum(0).int(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=table,
        tree_mask=None,
        logit_rows=torch.zeros(0, dtype=torch.int64),
        max_q=max([0, *q_lens]),
        max_seq_len=max([0, *seq_lens]),
    )


def grow_tree(batch: RaggedBatch, seq: int, parents: Sequence[int]) -> None:
    """Make the last rows of a sequence a draft tree: row 0 is its root, row 1 + i hangs on row 1 + parents[i].

    Positions become depths, and every row's mask holds its ancestors and itself.
    """
    first, last = batch.cu_q[seq].item(), batch.cu_q[seq + 1].item()
    if last - first != len(parents) + 1:
        raise ValueError(f"sequence {seq} has {last - first} rows, a tree of {len(parents)} drafts needs one more")
    if batch.tree_mask is None:
        batch.tree_mask = torch.zeros(batch.num_tokens, dtype=torch.int64)
    masks, depths = [1], [0]
    for node, parent in enumerate(parents):
        masks.append(masks[parent + 1] | 1 << (node + 1))
        depths.append(depths[parent + 1] + 1)
    batch.tree_mask[first:last] = torch.tensor(masks)
    batch.positions[first:last] = batch.positions[first] + torch.tensor(depths)


def make_cache(batch: RaggedBatch, spec: KVSpec, seed: int = 0) -> LayerKV:
    """Keys and values for every sequence of the batch; the null block and every slot that nobody owns are NaN."""
    num_blocks = max([0, *batch.block_table.flatten().tolist()]) + 2
    cache = allocate_layer(spec, num_blocks, "cpu")
    for tensor in cache.per_slot:
        poison(tensor)
    if spec.coding.scale == "static":
        cache.k_scale = torch.linspace(0.5, 2.0, spec.num_kv_heads)
        cache.v_scale = torch.linspace(1.5, 0.25, spec.num_kv_heads)
    owned = torch.cat(
        [torch.zeros(0, dtype=torch.int64), *(context_slots(batch, s, spec) for s in range(batch.num_seqs))]
    )
    heads = (len(owned), spec.num_kv_heads, spec.head_dim)
    k, v = (normal(heads, torch.float32, seed + i) for i in (1, 2))
    implementations("kv_write")["reference"].run(k, v, cache, owned)
    return cache


def poison(tensor: Tensor) -> None:
    """Fill with NaN where the dtype has one, else with the codes furthest from zero."""
    if tensor.dtype.is_floating_point:
        tensor.copy_(torch.full(tensor.shape, NAN))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def context_slots(batch: RaggedBatch, seq: int, spec: KVSpec) -> Tensor:
    """The slots of a sequence's keys, in order: [seq_len]."""
    index = torch.arange(batch.seq_lens[seq].item())
    return batch.block_table[seq].long()[index // spec.block_size] * spec.block_size + index % spec.block_size
