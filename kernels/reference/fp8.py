"""Weights and activations in float8 e4m3: one scale per output and row (fp8), or per 128 x 128 block (fp8_block).

    w[n, k] = code · scale;  codes [N, K] float8_e4m3fn, inputs contiguous

A block's scale is stored once per output, so that both formats read alike (3 % more bytes than one per block).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..packed import PackedWeight, QuantizedRows, RowFormat, WeightFormat, all_of, register, spread
from ..registry import op
from .int4 import PackedExperts, PackedLinear
from .kv_formats import FP8_MAX
from .moe import gated_experts
from .rows import dequantize_rows, quantize_rows

BLOCK = 128
# Scales that are tried, over the smallest. The grid's steps double at powers of two, so an octave is all there is, and
# where in it most weights lie decides their error: of a Gaussian row of 256 0.0238 at best, 0.0260 at the smallest.
OCTAVE = torch.linspace(1, 2, 17)[:-1].tolist()


def quantize_fp8(weight: Tensor, group: int | None) -> PackedWeight:
    w = weight.float()
    scale = choose_scale(w)
    return PackedWeight(
        format="fp8",
        outputs=weight.shape[0],
        inputs=weight.shape[1],
        group=weight.shape[1],
        codes=_encode(w, scale),
        scales=scale.T.contiguous(),
    )


def choose_scale(w: Tensor) -> Tensor:
    """The scale of least squared error for each row of w [R, n]: [R, 1] fp32, the largest weight within ±448."""
    smallest = w.abs().amax(-1, keepdim=True) / FP8_MAX
    smallest = torch.where(smallest > 0, smallest, 1.0)
    least, chosen = torch.full_like(smallest, torch.inf), smallest
    for octave in OCTAVE:
        scale = smallest * octave
        error = (_encode(w, scale).float() * scale - w).square().sum(-1, keepdim=True)
        chosen, least = torch.where(error < least, scale, chosen), torch.minimum(error, least)
    return chosen


def _encode(w: Tensor, scale: Tensor) -> Tensor:
    return (w / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantize_fp8_block(weight: Tensor, group: int | None) -> PackedWeight:
    outputs, inputs = weight.shape
    w = torch.nn.functional.pad(weight.float(), (0, -inputs % BLOCK, 0, -outputs % BLOCK))
    blocks = w.reshape(w.shape[0] // BLOCK, BLOCK, w.shape[1] // BLOCK, BLOCK).transpose(1, 2)
    return pack_blocks(weight, choose_scale(blocks.flatten(0, 1).flatten(1)).view(blocks.shape[:2]))


def pack_blocks(weight: Tensor, scale: Tensor) -> PackedWeight:
    """Divide weight [N, K] by its blocks' scales [ceil(N / 128), ceil(K / 128)]; fp8 codes are taken as they are."""
    outputs, inputs = weight.shape
    scales = scale.float().repeat_interleave(BLOCK, 0)[:outputs].T.contiguous()  # [G, N]
    codes = weight
    if weight.dtype != torch.float8_e4m3fn:
        codes = _encode(weight.float(), spread(scales, BLOCK, inputs))
    return PackedWeight("fp8_block", outputs, inputs, BLOCK, codes, scales)


def dequantize_fp8(weight: PackedWeight) -> Tensor:
    """[(E,) N, K] fp32."""
    return weight.codes.float() * spread(weight.scales, weight.group, weight.inputs)


def _refuses_groups(outputs: int, inputs: int, group: int) -> str | None:
    if all_of(inputs, group) != inputs:
        return f"fp8 has one scale per output, not one per {group} inputs; fp8_block has one per 128 x 128"
    return None


def _refuses_other_blocks(outputs: int, inputs: int, group: int) -> str | None:
    return None if group in (0, BLOCK) else f"fp8_block has a scale per {BLOCK} x {BLOCK} weights, not per {group}"


def _row_format(weight: PackedWeight) -> RowFormat:
    return RowFormat(torch.float8_e4m3fn, 0 if weight.group == weight.inputs else weight.group, weight.input_scale)


_fp8 = register(
    WeightFormat(
        name="fp8",
        quantize=quantize_fp8,
        dequantize=dequantize_fp8,
        refuses=_refuses_groups,
        rows=_row_format,
        bits=8,
        output_dim=-2,
        capability=(8, 9),
        gpu="Ada or Hopper",
    )
)
register(replace(_fp8, name="fp8_block", quantize=quantize_fp8_block, refuses=_refuses_other_blocks, group=BLOCK))


def prepare_linear_fp8(weight: PackedWeight, bias: Tensor | None) -> PackedLinear:
    """Once per weight, bias [N] or None. The caller drops its own reference to the weight."""
    return PackedLinear(weight, bias)


def _product(x: Tensor | QuantizedRows, weight: PackedWeight, values: Tensor) -> Tensor:
    """Quantized rows times dequantized weights [N, K] in fp32: [T, N] fp32."""
    rows = x if isinstance(x, QuantizedRows) else quantize_rows(x, _row_format(weight))
    return dequantize_rows(rows) @ values.T


@op(prepare=prepare_linear_fp8)
def linear_fp8(x: Tensor | QuantizedRows, packed: Any) -> Tensor:
    """(xq · wqᵀ) times both scales, plus bias, accumulated in fp32: [T, K] -> [T, N] in x's dtype.

    x: plain rows, which are quantized first (`quantize_rows`), or rows that were quantized by what made them.
    """
    out = _product(x, packed.weight, dequantize_fp8(packed.weight))
    return (out if packed.bias is None else out + packed.bias.float()).to(x.dtype)


@op(prepare=prepare_linear_fp8)
def linear_fp8_block(x: Tensor | QuantizedRows, packed: Any) -> Tensor:
    """Σ over blocks of 128 inputs of (xq · wqᵀ) times the block's scales, plus bias; accumulated in fp32."""
    out = _product(x, packed.weight, dequantize_fp8(packed.weight))
    return (out if packed.bias is None else out + packed.bias.float()).to(x.dtype)


def prepare_moe_fp8(gate_up: PackedWeight, down: PackedWeight) -> PackedExperts:
    """Once per layer: E weights [2f, d] with the gate in the first f outputs, and E of [d, f]."""
    return PackedExperts(gate_up, down)


def _moe(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    gate_up, down = dequantize_fp8(packed.gate_up), dequantize_fp8(packed.down)
    return gated_experts(
        x,
        topk_weights,
        topk_ids,
        activation,
        lambda h, e: _product(h, packed.gate_up, gate_up[e]),
        lambda h, e: _product(h, packed.down, down[e]),
    )


@op(prepare=prepare_moe_fp8)
def moe_fp8(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See `moe`; activations are quantized per token before each of the two products."""
    return _moe(x, packed, topk_weights, topk_ids, activation)


@op(prepare=prepare_moe_fp8)
def moe_fp8_block(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See `moe`; activations are quantized per token and 128 inputs before each of the two products."""
    return _moe(x, packed, topk_weights, topk_ids, activation)
