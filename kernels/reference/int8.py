"""Eight-bit weights, with plain activations (int8, W8A16) or with activations in int8 too (w8a8).

w[n, k] = code · scale,  code in -127 .. 127;  codes [N, K] int8, inputs contiguous
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..packed import PackedWeight, QuantizedRows, RowFormat, WeightFormat, all_of, register, spread
from ..registry import op
from .int4 import PackedExperts, PackedLinear
from .moe import gated_experts
from .rows import quantize_rows

INT8_MAX = 127


def quantize_int8(weight: Tensor, group: int | None) -> PackedWeight:
    outputs, inputs = weight.shape
    group = all_of(inputs, group or 0)
    w = weight.float().reshape(outputs, inputs // group, group)
    scale = w.abs().amax(-1, keepdim=True) / INT8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return PackedWeight(
        format="int8",
        outputs=outputs,
        inputs=inputs,
        group=group,
        codes=(w / scale).round().to(torch.int8).reshape(outputs, inputs),
        scales=scale.squeeze(-1).T.contiguous(),
    )


def quantize_w8a8(weight: Tensor, group: int | None) -> PackedWeight:
    packed = quantize_int8(weight, 0)
    return PackedWeight("w8a8", packed.outputs, packed.inputs, packed.group, packed.codes, packed.scales)


def dequantize_int8(weight: PackedWeight) -> Tensor:
    """[(E,) N, K] fp32, columns in the order of the inputs."""
    values = weight.codes.float() * spread(weight.scales, weight.group, weight.inputs)
    return values if weight.order is None else values[..., weight.order.argsort()]


def _refuses(outputs: int, inputs: int, group: int) -> str | None:
    group = all_of(inputs, group)
    if inputs % group:
        return f"{inputs} inputs are no multiple of the group {group}; take one scale per output (group 0)"
    if group != inputs and group % 32:
        return f"a group of {group} inputs is no multiple of 32; take 32, 64, 128 or one scale per output (group 0)"
    return None


def _refuses_groups(outputs: int, inputs: int, group: int) -> str | None:
    if all_of(inputs, group) != inputs:
        return f"one scale per output is what integer products can use, not groups of {group}; int8 takes groups"
    return None


register(
    WeightFormat(
        name="int8", quantize=quantize_int8, dequantize=dequantize_int8, refuses=_refuses, bits=8, output_dim=-2
    )
)


def _row_format(weight: PackedWeight) -> RowFormat:
    return RowFormat(torch.int8, scale=weight.input_scale)


register(
    WeightFormat(
        name="w8a8",
        quantize=quantize_w8a8,
        dequantize=dequantize_int8,
        refuses=_refuses_groups,
        rows=_row_format,
        bits=8,
        output_dim=-2,
    )
)


def prepare_linear_int8(weight: PackedWeight, bias: Tensor | None) -> PackedLinear:
    """Once per weight, bias [N] or None. The caller drops its own reference to the weight."""
    return PackedLinear(weight, bias)


@op(prepare=prepare_linear_int8)
def linear_int8(x: Tensor, packed: Any) -> Tensor:
    """x · weightᵀ + bias in fp32, rounded once: x [T, K] -> [T, N] in x's dtype."""
    out = x.float() @ dequantize_int8(packed.weight).T
    return (out if packed.bias is None else out + packed.bias.float()).to(x.dtype)


@op(prepare=prepare_linear_int8)
def linear_w8a8(x: Tensor | QuantizedRows, packed: Any) -> Tensor:
    """Σ_k xq[t, k] · wq[n, k] exactly in integers, times both scales, plus bias: [T, K] -> [T, N].

    x: plain rows, which are quantized first (`quantize_rows`), or rows that were quantized by what made them.
    """
    weight = packed.weight
    rows = x if isinstance(x, QuantizedRows) else quantize_rows(x, _row_format(weight))
    # Integers below 2**53 are exact in float64, whose product is fast everywhere.
    total = (rows.codes.double() @ weight.codes.double().T).float()
    out = total * rows.scales * weight.scales.float()
    return (out if packed.bias is None else out + packed.bias.float()).to(rows.dtype)


def prepare_moe_int8(gate_up: PackedWeight, down: PackedWeight) -> PackedExperts:
    """Once per layer: E weights [2f, d] with the gate in the first f outputs, and E of [d, f]."""
    return PackedExperts(gate_up, down)


@op(prepare=prepare_moe_int8)
def moe_int8(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See `moe`; the products in fp32."""
    gate_up, down = dequantize_int8(packed.gate_up), dequantize_int8(packed.down)
    return gated_experts(
        x, topk_weights, topk_ids, activation, lambda h, e: h @ gate_up[e].T, lambda h, e: h @ down[e].T
    )


@op(prepare=prepare_moe_int8)
def moe_w8a8(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See `moe`; activations are quantized per token before each of the two products."""

    def product(weight: PackedWeight, h: Tensor, expert: int) -> Tensor:
        rows = quantize_rows(h, _row_format(weight))
        total = (rows.codes.double() @ weight.codes[expert].double().T).float()
        return total * rows.scales * weight.scales[expert].float()

    return gated_experts(
        x,
        topk_weights,
        topk_ids,
        activation,
        lambda h, e: product(packed.gate_up, h, e),
        lambda h, e: product(packed.down, h, e),
    )
