"""Products with quantized weights, dense and by experts, beside cuBLAS in bf16 for the same shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.packed import PackedWeight, weight_format
from .gpu_clock import DEVICE, Ceilings, copies_beyond_l2, time_calls
from .gpu_limits import BF16, aim, remarks, resolved, roofline_row
from .gpu_rows import Item, Row

# (name, N, K): joined projections of Llama-3.1 8B and 70B.
SHAPES = (
    ("8B gate_up", 28672, 4096),
    ("8B down", 4096, 14336),
    ("8B o", 4096, 4096),
    ("8B qkv", 6144, 4096),
    ("70B gate_up", 57344, 8192),
    ("70B down", 8192, 28672),
    ("70B o", 8192, 8192),
)
# (name, experts, of which a token takes, hidden, ffn): Qwen3-30B-A3B and Mixtral 8x7B.
MIXTURES = (("30B-A3B", 128, 8, 2048, 768), ("8x7B", 8, 2, 4096, 14336))
FORMATS = ("int4", "fp8", "w8a8", "int8", "fp8_block")
PEAK_OF = {"fp8": "fp8", "fp8_block": "fp8", "w8a8": "int8"}  # the rest multiply in bf16


def linear_items(quick: bool, ceilings: Ceilings) -> Iterator[Item]:
    counts = (1, 16, 64, 1024) if quick else (1, 4, 16, 32, 64, 128, 512, 2048)
    for shape in SHAPES[: 2 if quick else None]:
        for name in FORMATS:
            key = f"{name} {shape[0]}"
            yield Item(key, partial(_linear, key, name, shape, counts, ceilings))


def random_weight(name: str, outputs: int, inputs: int) -> PackedWeight:
    """A weight of the format on the device, of the size that trained weights have."""
    weight = torch.randn(outputs, inputs, device=DEVICE, dtype=torch.float32) * inputs**-0.5
    if name != "int4":
        return weight_format(name).quantize(weight, None)
    # To search the best range of every group takes longer than what is measured: 256 outputs, repeated.
    few = weight_format(name).quantize(weight[:256], None)
    times = -(-outputs // 256)
    return replace(
        few,
        outputs=outputs,
        codes=few.codes.repeat(1, times)[:, :outputs].contiguous(),
        scales=few.scales.repeat(1, times)[:, :outputs].contiguous(),
        zeros=None,
    )


def copied(weight: PackedWeight) -> PackedWeight:
    """The same numbers elsewhere in memory."""
    return replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone())


def peak_rate(name: str, ceilings: Ceilings) -> float:
    """Of the products that a format's kernels are made of; of bf16 where the card's own could not be measured."""
    return getattr(ceilings, PEAK_OF.get(name, "bf16")) or ceilings.bf16


def target_of(name: str, rows: int) -> float | None:
    """How many times as fast as cuBLAS in bf16 a product of so many rows is meant to be."""
    if name == "int4":
        return 3.0 if rows <= 16 else 1.5 if rows == 64 else None
    return 1.5 if name == "fp8" and rows >= 512 else None


def _linear(key: str, name: str, shape: tuple[str, int, int], counts: Sequence[int], ceilings: Ceilings) -> list[Row]:
    _, outputs, inputs = shape
    kernels = resolved()
    op_name = weight_format(name).linear
    op = getattr(kernels, op_name)
    first = random_weight(name, outputs, inputs)
    weights = [first, *(copied(first) for _ in range(copies_beyond_l2(first.nbytes) - 1))]
    packed = [op.prepare(weight, None) for weight in weights]
    rows = []
    for count in counts:
        x = torch.randn(count, inputs, device=DEVICE, dtype=BF16)
        # In a model the norm before has quantized them already.
        to = weight_format(name).rows(first)
        taken = x if to is None else kernels.quantize_rows.run(x, to)
        timing = time_calls([partial(op.run, taken, weight) for weight in packed])
        nbytes = first.nbytes + 2 * count * (inputs + outputs)
        operations = 2 * count * outputs * inputs
        row = roofline_row(
            "products", f"{key} M={count}", timing, nbytes, operations, peak_rate(name, ceilings), ceilings
        )
        row.peer = _dense_seconds(outputs, inputs, count) / timing.seconds
        row.note = remarks(kernels, op_name, timing)
        if (times := target_of(name, count)) is not None:
            aim(row, f"{times:.1f} x cuBLAS bf16", row.peer >= times)
        rows.append(row)
    return rows


@cache  # every format is held against the same product
def _dense_seconds(outputs: int, inputs: int, count: int) -> float:
    """Seconds of cuBLAS in bf16."""
    copies = copies_beyond_l2(2 * outputs * inputs)
    weights = [torch.randn(outputs, inputs, device=DEVICE, dtype=BF16) for _ in range(copies)]
    x = torch.randn(count, inputs, device=DEVICE, dtype=BF16)
    return time_calls([partial(F.linear, x, weight) for weight in weights]).seconds


def moe_items(quick: bool, ceilings: Ceilings) -> Iterator[Item]:
    counts = (1, 64) if quick else (1, 16, 64, 512, 4096)
    for model in MIXTURES[: 1 if quick else None]:
        for name in ("", *FORMATS):
            key = f"{name or 'bf16'} {model[0]}"
            yield Item(key, partial(_moe, key, name, model, counts, ceilings))


def _moe(
    key: str, name: str, model: tuple[str, int, int, int, int], counts: Sequence[int], ceilings: Ceilings
) -> list[Row]:
    _, experts, top_k, hidden, ffn = model
    kernels = resolved()
    op_name = weight_format(name).moe if name else "moe"
    op = getattr(kernels, op_name)
    weights = [_experts(name, experts, n, k) for n, k in ((2 * ffn, hidden), (hidden, ffn))]
    total = sum(weight.nbytes for weight in weights)
    packed = op.prepare(*weights)
    rows = []
    for count in counts:
        x = torch.randn(count, hidden, device=DEVICE, dtype=BF16)
        # Several routings in turn, so that a few rows do not find their experts in the L2 cache.
        routes = [torch.rand(count, experts, device=DEVICE).softmax(-1).topk(top_k, dim=-1) for _ in range(8)]
        timing = time_calls([partial(op.run, x, packed, r.values, r.indices, "silu") for r in routes])
        touched = sum(len(r.indices.unique()) for r in routes) / len(routes)
        nbytes = total * touched / experts + 4 * count * hidden
        operations = 2 * count * top_k * 3 * hidden * ffn
        row = roofline_row(
            "experts", f"{key} T={count}", timing, nbytes, operations, peak_rate(name, ceilings), ceilings
        )
        row.note = remarks(kernels, op_name, timing, f"{touched:.0f} experts touched")
        rows.append(row)
    return rows


def _experts(name: str, experts: int, outputs: int, inputs: int) -> Any:
    if not name:
        return torch.randn(experts, outputs, inputs, device=DEVICE, dtype=BF16) * inputs**-0.5
    one = random_weight(name, outputs, inputs)
    return replace(one, codes=one.codes.repeat(experts, 1, 1), scales=one.scales.repeat(experts, 1, 1))
