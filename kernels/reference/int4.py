"""Four-bit weights in groups along the inputs, with 16-bit activations (W4A16).

    w[n, k] = (code - zero) · scale,  code in 0 .. 15, zero 8 where none is stored

codes [K / 2, N] uint8, outputs contiguous. Inputs are cut in blocks of B = `split_block(group)`; within the block that
begins at k0, byte r holds input k0 + r in its low nibble and k0 + B / 2 + r in its high one. A kernel thus gets two
half blocks with one mask and one shift, and loads no byte twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..packed import PackedWeight, WeightFormat, all_of, register, spread
from ..registry import op
from .moe import gated_experts

BLOCKS = (128, 64, 32)
ZERO = 8
# Shrunken ranges that are tried for each group: what the largest weight loses the others gain.
SHRINKS = torch.linspace(1.0, 0.7, 13).tolist()


def split_block(group: int) -> int:
    """Inputs that are packed together: the largest of 128, 64 and 32 that divides the group; 0 = none does."""
    return next((block for block in BLOCKS if group % block == 0), 0)


def pack_int4(codes: Tensor, group: int) -> Tensor:
    """codes [N, K] in 0 .. 15 -> [K / 2, N] uint8."""
    outputs, inputs = codes.shape
    block = split_block(group)
    halves = codes.to(torch.uint8).T.reshape(inputs // block, 2, block // 2, outputs)
    return (halves[:, 0] | (halves[:, 1] << 4)).reshape(inputs // 2, outputs).contiguous()


def unpack_int4(packed: Tensor, group: int) -> Tensor:
    """[(E,) K / 2, N] uint8 -> codes [(E,) N, K] uint8."""
    half = split_block(group) // 2
    lead, (rows, outputs) = packed.shape[:-2], packed.shape[-2:]
    blocks = packed.reshape(*lead, rows // half, half, outputs)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-3)
    return codes.reshape(*lead, 2 * rows, outputs).transpose(-1, -2)


def quantize_int4(weight: Tensor, group: int | None) -> PackedWeight:
    """With zero points; to nearest in the range that `choose_range` finds for each group."""
    outputs, inputs = weight.shape
    group = all_of(inputs, FORMAT.group if group is None else group)
    w = weight.float().reshape(outputs, inputs // group, group)
    scale, zero = choose_range(w)
    codes = (w / scale + zero).round().clamp(0, 15).reshape(outputs, inputs)
    return from_codes(codes, scale.squeeze(-1).T, zero.squeeze(-1).T, group)


def choose_range(w: Tensor, importance: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, w [..., group]: of several ranges the one of least squared error.

    importance: weighs the errors, in w's shape or one that spreads to it -> scale, zero [..., 1] fp32. The scale is
    rounded to fp16 first, so that codes are made with the very number that reads them.
    """
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    least = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        step = ((high - low) * (shrink / 15)).half().float()
        step = torch.where(step > 0, step, 1.0)
        middle = (-low * shrink / step).round().clamp(0, 15)
        errors = ((w / step + middle).round().clamp(0, 15) - middle) * step - w
        error = (errors.square() * importance).sum(-1, keepdim=True)
        better = error < least
        least, scale, zero = (
            torch.where(better, new, old) for new, old in ((error, least), (step, scale), (middle, zero))
        )
    return scale, zero


def from_codes(codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> PackedWeight:
    """codes [N, K] and zeros [G, N] in 0 .. 15, scales [G, N]."""
    return PackedWeight(
        format="int4",
        outputs=codes.shape[0],
        inputs=codes.shape[1],
        group=group,
        codes=pack_int4(codes, group),
        scales=scales.half().contiguous(),
        zeros=zeros.to(torch.uint8).contiguous(),
    )


def dequantize_int4(weight: PackedWeight) -> Tensor:
    """[(E,) N, K] fp32, columns in the order of the inputs."""
    codes = unpack_int4(weight.codes, weight.group).float()
    zeros = ZERO if weight.zeros is None else spread(weight.zeros, weight.group, weight.inputs)
    values = (codes - zeros) * spread(weight.scales, weight.group, weight.inputs)
    return values if weight.order is None else values[..., weight.order.argsort()]


def _refuses(outputs: int, inputs: int, group: int) -> str | None:
    group = all_of(inputs, group)
    if inputs % group:
        return f"{inputs} inputs are no multiple of the group {group}; take a group of {_nearest(inputs)}"
    if not split_block(group):
        return f"a group of {group} inputs is no multiple of 32; take {_nearest(inputs)}, or int8"
    return None


def _nearest(inputs: int) -> str:
    return " or ".join(str(block) for block in BLOCKS if inputs % block == 0) or "none (no kernel divides these inputs)"


FORMAT = register(
    WeightFormat(
        name="int4",
        quantize=quantize_int4,
        dequantize=dequantize_int4,
        refuses=_refuses,
        bits=4,
        output_dim=-1,
        interleaved=split_block,
        group=128,
        scale_bytes=2,
        zeros=True,
    )
)


class PackedLinear(NamedTuple):
    weight: PackedWeight
    bias: Tensor | None  # [N]


def prepare_linear_int4(weight: PackedWeight, bias: Tensor | None) -> PackedLinear:
    """Once per weight, bias [N] or None. The caller drops its own reference to the weight."""
    return PackedLinear(weight, bias)


@op(prepare=prepare_linear_int4)
def linear_int4(x: Tensor, packed: Any) -> Tensor:
    """x · weightᵀ + bias in fp32, rounded once: x [T, K] -> [T, N] in x's dtype."""
    out = x.float() @ dequantize_int4(packed.weight).T
    return (out if packed.bias is None else out + packed.bias.float()).to(x.dtype)


class PackedExperts(NamedTuple):
    gate_up: PackedWeight  # E of [2f, d]
    down: PackedWeight  # E of [d, f]


def prepare_moe_int4(gate_up: PackedWeight, down: PackedWeight) -> PackedExperts:
    """Once per layer: E weights [2f, d] with the gate in the first f outputs, and E of [d, f]."""
    return PackedExperts(gate_up, down)


@op(prepare=prepare_moe_int4)
def moe_int4(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See `moe`; the products in fp32."""
    gate_up, down = dequantize_int4(packed.gate_up), dequantize_int4(packed.down)
    return gated_experts(
        x, topk_weights, topk_ids, activation, lambda h, e: h @ gate_up[e].T, lambda h, e: h @ down[e].T
    )
