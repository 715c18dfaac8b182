"""Attention: decodes and verifications against the copy bandwidth, prompts against the rate of products.

Bytes are those that no implementation can do without (kernels/io_model.py); torch's fused attention on dense keys and
values is the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import Kernels
from ..kernels.batch import KVSpec, LayerKV, RaggedBatch, allocate_layer
from ..kernels.io_model import compulsory
from ..kernels.kv_formats import kv_formats
from .gpu_clock import DEVICE, Ceilings, copies_beyond_l2, time_calls
from .gpu_inputs import batch_of, moved
from .gpu_limits import BF16, BLOCK_SIZE, aim, bandwidth_row, remarks, resolved, roofline_row
from .gpu_rows import Item, Row

SECTION = "attention"
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3.1 8B


def items(quick: bool, ceilings: Ceilings) -> Iterator[Item]:
    decodes: list[tuple[str, Sequence[int], Sequence[int], float | None]] = [
        ("decode 64 x 4k", [1] * 64, [4095] * 64, 0.8),
        ("decode 1 x 32k", [1], [32767], None),
        ("decode 16 x 1k", [1] * 16, [1023] * 16, None),
        ("verify 32 x (1 + 7) on 2k", [8] * 32, [2040] * 32, None),
        ("decode ragged 64, 128 to 8k", [1] * 64, [128 * (i + 1) for i in range(64)], None),
    ]
    formats = [name for name in kv_formats() if name not in ("fp16", "fp32")]
    for kv in formats:
        for label, q_lens, contexts, target in decodes[: 2 if quick else None]:
            name = f"{label} {kv}"
            yield Item(name, partial(_decode, name, kv, q_lens, contexts, target, ceilings))
    prompts: list[tuple[str, Sequence[int], Sequence[int], float | None]] = [
        ("prefill 1 x 8k", [8192], [0], 0.6),
        ("prefill 4 x 2k", [2048] * 4, [0] * 4, None),
        ("chunk 2k on 14k", [2048], [14336], None),
        ("mixed: 32 decodes x 2k, prompt 2k", [1] * 32 + [2048], [2047] * 32 + [0], None),
    ]
    for kv in formats[:1] if quick else formats:
        for label, q_lens, contexts, target in prompts[: 1 if quick else None]:
            name = f"{label} {kv}"
            yield Item(name, partial(_prompt, name, kv, q_lens, contexts, target if kv == "bf16" else None, ceilings))


def setup(kv: str, q_lens: Sequence[int], contexts: Sequence[int], layers: int) -> tuple[RaggedBatch, Tensor, Any]:
    """A batch, its queries [T, Hq, D], and the caches of so many layers, filled."""
    batch = moved(batch_of(q_lens, contexts, BLOCK_SIZE), DEVICE)
    blocks = int(batch.block_table.max()) + 1
    q = torch.randn(batch.num_tokens, Q_HEADS, HEAD_DIM, device=DEVICE, dtype=BF16)
    return batch, q, [filled(KVSpec(BLOCK_SIZE, KV_HEADS, HEAD_DIM, kv), blocks, seed) for seed in range(layers)]


def filled(spec: KVSpec, blocks: int, seed: int) -> LayerKV:
    """A cache of random keys and values, encoded in pieces so that little memory is needed besides."""
    cache = allocate_layer(spec, blocks, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    coding, piece = spec.coding, 1024
    for first in range(0, blocks, piece):
        count = min(piece, blocks - first)
        for pages, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            shape = (count, spec.block_size, spec.num_kv_heads, spec.head_dim)
            x = torch.randn(shape, device=DEVICE, generator=generator)
            codes, token_scale = coding.encode(x, scale if coding.scale == "static" else None)
            pages[first : first + count] = codes
            if scale is not None and token_scale is not None:
                scale[first : first + count] = token_scale
    return cache


def _calls(kernels: Kernels, batch: RaggedBatch, q: Tensor, caches: Sequence[LayerKV]) -> list[Callable[[], Any]]:
    plan = kernels.attention.prepare(batch, BLOCK_SIZE, None)
    return [partial(kernels.attention.run, q, cache, plan, HEAD_DIM**-0.5, 0.0, None) for cache in caches]


def _decode(
    name: str, kv: str, q_lens: Sequence[int], contexts: Sequence[int], target: float | None, ceilings: Ceilings
) -> list[Row]:
    seq_lens = [q + c for q, c in zip(q_lens, contexts, strict=True)]
    must = compulsory(KVSpec(BLOCK_SIZE, KV_HEADS, HEAD_DIM, kv), seq_lens, q_lens, Q_HEADS, None, BF16.itemsize).total
    copies = copies_beyond_l2(must)
    batch, q, caches = setup(kv, q_lens, contexts, copies)
    kernels = resolved(kv)
    timing = time_calls(_calls(kernels, batch, q, caches))
    row = bandwidth_row(SECTION, name, timing, must, ceilings)
    row.note = remarks(kernels, "attention", timing)
    if target is not None and row.share is not None:
        aim(row, f"{100 * target:.0f} % of copy", row.share >= target)
    if kv == "bf16" and len(set(seq_lens)) == 1:
        del caches
        row.peer = _dense_decode(len(q_lens), q_lens[0], seq_lens[0], copies) / timing.seconds
    return [row]


def _dense_decode(sequences: int, rows: int, keys: int, copies: int) -> float:
    """Seconds of torch's fused attention for the same work on keys and values without pages."""
    shape = (sequences, KV_HEADS, keys, HEAD_DIM)
    pairs = [[torch.randn(shape, device=DEVICE, dtype=BF16) for _ in "kv"] for _ in range(copies)]
    q = torch.randn(sequences, Q_HEADS, rows, HEAD_DIM, device=DEVICE, dtype=BF16)
    return time_calls([partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True) for k, v in pairs]).seconds


def _prompt(
    name: str, kv: str, q_lens: Sequence[int], contexts: Sequence[int], target: float | None, ceilings: Ceilings
) -> list[Row]:
    batch, q, caches = setup(kv, q_lens, contexts, 1)
    kernels = resolved(kv)
    timing = time_calls(_calls(kernels, batch, q, caches))
    seen = sum(n * c + n * (n + 1) // 2 for n, c in zip(q_lens, contexts, strict=True))  # (query, key) pairs
    spec = KVSpec(BLOCK_SIZE, KV_HEADS, HEAD_DIM, kv)
    seq_lens = [n + c for n, c in zip(q_lens, contexts, strict=True)]
    must = compulsory(spec, seq_lens, q_lens, Q_HEADS, None, BF16.itemsize).total
    row = roofline_row(SECTION, name, timing, must, 4 * Q_HEADS * HEAD_DIM * seen, ceilings.bf16, ceilings)
    row.note = remarks(kernels, "attention", timing)
    if target is not None and row.share is not None:
        aim(row, f"{100 * target:.0f} % of bf16", row.share >= target)
    if kv == "bf16" and len(set(q_lens)) == 1 and not any(contexts):
        shape = (len(q_lens), Q_HEADS, q_lens[0], HEAD_DIM)
        dense = [torch.randn(shape, device=DEVICE, dtype=BF16) for _ in "qkv"]
        row.peer = (
            time_calls([partial(F.scaled_dot_product_attention, *dense, is_causal=True)]).seconds / timing.seconds
        )
    return [row]
