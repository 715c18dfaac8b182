"""The row kernels, the cache's and the sampler's: work whose limit is the bytes of its arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.batch import KVSpec
from ..kernels.packed import RowFormat
from ..kernels.reference.rope import rope_table
from .gpu_attention import filled
from .gpu_clock import DEVICE, Ceilings, copies_beyond_l2, time_calls
from .gpu_inputs import moved, sampling_rows
from .gpu_limits import BF16, BLOCK_SIZE, bandwidth_row, remarks, resolved
from .gpu_rows import Item, Row

VOCAB, HIDDEN, FFN = 128256, 4096, 14336  # Llama-3.1 8B


def items(quick: bool, ceilings: Ceilings) -> Iterator[Item]:
    for count in (64,) if quick else (1, 64, 2048):
        for op, call in _row_calls(count).items():
            yield Item(f"{op} T={count}", partial(_timed, op, f"T={count}", call, ceilings))
    for kv in ("bf16", "fp8_e4m3", "int8_per_token_head", "int4_per_token_head"):
        for count in (64,) if quick else (64, 2048):
            for op, call in _cache_calls(count, kv).items():
                yield Item(f"{op} {kv} T={count}", partial(_timed, op, f"{kv} T={count}", call, ceilings, kv))
    for count in (64,) if quick else (1, 64, 256):
        for label, (op, call) in _sampling_calls(count).items():
            yield Item(f"{label} L={count}", partial(_timed, op, f"{label} L={count}", call, ceilings))


Call = Callable[[], tuple[int, list[tuple[Any, ...]]]]  # -> bytes that must move, arguments of calls in turn


def _timed(op: str, label: str, call: Call, ceilings: Ceilings, kv: str = "bf16") -> list[Row]:
    kernels = resolved(kv)
    nbytes, arguments = call()
    timing = time_calls([partial(getattr(kernels, op).run, *these) for these in arguments])
    name = label if label.startswith(op) else f"{op} {label}"
    row = bandwidth_row("small", name, timing, nbytes, ceilings)
    row.note = remarks(kernels, op, timing)
    return [row]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=BF16)


def _row_calls(count: int) -> dict[str, Call]:
    """Of a layer of Llama-3.1 8B."""
    hidden, ffn, eps = HIDDEN, FFN, 1e-5
    to = RowFormat(torch.float8_e4m3fn)
    row, gated = 2 * count * hidden, 2 * count * ffn  # bytes

    def over(width: int, inputs: int, make: Callable[..., tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        copies = copies_beyond_l2(2 * count * width * inputs)
        return [make(*(_random(count, width) for _ in range(inputs))) for _ in range(copies)]

    return {
        "rms_norm": lambda: (2 * row, over(hidden, 1, lambda x: (x, _random(hidden), eps, 0.0))),
        "add_rms_norm": lambda: (4 * row, over(hidden, 2, lambda x, r: (x, r, _random(hidden), eps, 0.0))),
        "add_rms_norm_rows": lambda: (
            7 * row // 2,
            over(hidden, 2, lambda x, r: (x, r, _random(hidden), eps, 0.0, to)),
        ),
        "silu_and_mul": lambda: (3 * gated, over(2 * ffn, 1, lambda x: (x,))),
        "silu_and_mul_rows": lambda: (5 * gated // 2, over(2 * ffn, 1, lambda x: (x, to))),
        "quantize_rows": lambda: (3 * row // 2, over(hidden, 1, lambda x: (x, to))),
    }


def _cache_calls(count: int, kv: str) -> dict[str, Call]:
    """Of a layer of Llama-3.1 8B: 32 query and 8 KV heads of 128."""
    heads, kv_heads, dim = 32, 8, 128
    spec = KVSpec(BLOCK_SIZE, kv_heads, dim, kv)

    def arguments(rotate: bool) -> list[tuple[Any, ...]]:
        blocks = -(-count // BLOCK_SIZE) + 1
        table = rope_table(dim, 4096, 500000.0, None, 4096).to(DEVICE)
        positions = torch.arange(count, device=DEVICE)
        slots = BLOCK_SIZE + torch.randperm(count, device=DEVICE)
        made: list[tuple[Any, ...]] = []
        for seed in range(copies_beyond_l2(2 * count * (heads + 2 * kv_heads) * dim)):
            q, k, v = _random(count, heads + 2 * kv_heads, dim).split((heads, kv_heads, kv_heads), 1)
            cache = filled(spec, blocks, seed)
            made.append((q, k, v, positions, table, False, cache, slots) if rotate else (k, v, cache, slots))
        return made

    values = 2 * count * kv_heads * dim * BF16.itemsize
    stored = 2 * count * kv_heads * spec.coding.bytes_per_head(dim)
    queries = 2 * count * heads * dim * BF16.itemsize
    return {
        "kv_write": lambda: (values + stored, arguments(False)),
        "rope_kv_write": lambda: (values + stored + queries + 4 * count * dim, arguments(True)),
    }


def _sampling_calls(count: int) -> dict[str, tuple[str, Call]]:
    """One reading of the logits is the limit; filters that need more show as a smaller share."""
    nbytes = 4 * count * VOCAB

    def rows(kept: int, **overrides: float) -> list[tuple[Any, ...]]:
        names = ("logits", "temperature", "top_k", "top_p", "min_p", "seeds", "sample_index", "positions")
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | overrides
        made = []
        for _ in range(min(8, copies_beyond_l2(nbytes))):
            arguments = dict(zip(names, moved(sampling_rows(count, VOCAB), DEVICE), strict=True))
            for name, value in neutral.items():
                arguments[name] = torch.full_like(arguments[name], value)
            made.append(tuple(arguments.values())[:kept])
        return made

    def rivals() -> list[tuple[Any, ...]]:
        ids = torch.arange(count, device=DEVICE)
        return [(logits, ids, 5) for (logits,) in rows(1)]

    return {
        "greedy": ("greedy", lambda: (nbytes, rows(1))),
        "sample plain": ("sample", lambda: (nbytes, rows(8))),
        "sample top_k 40": ("sample", lambda: (nbytes, rows(8, top_k=40))),
        "sample top_p 0.9": ("sample", lambda: (nbytes, rows(8, top_p=0.9))),
        "sample min_p 0.05": ("sample", lambda: (nbytes, rows(8, min_p=0.05))),
        "token_logprobs 5": ("token_logprobs", lambda: (nbytes, rivals())),
    }
