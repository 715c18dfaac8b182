"""Mixtures of experts: where a token goes (src/routing.h), and the experts by matrix tiles (src/moe.h)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...packed import PackedWeight
from ...reference import int4, int8
from ...reference.routing import check_top_k
from ...registry import Target, implements
from .library import DTYPES, OUT_OF_MEMORY, OUT_OF_RANGE, Kernel, address, usable
from .linear import Packed, has_tiles, prepare_linear
from .linear_quantized import prepare_linear_int4, prepare_linear_int8, refusal
from .pages import huge_empty

log = logging.getLogger(__name__)

_EXPERTS = "ipppiii"  # kind, weight, scales, zeros, group, inputs, outputs
_route = Kernel("route", "iipiiipp")
_moe = Kernel("moe", "iipiiipp" + 2 * _EXPERTS + "ipppp")


@implements("route", "native", when=usable)
def route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """See the reference."""
    logits = logits.contiguous()
    rows, experts = logits.shape
    check_top_k(top_k, experts)
    weights = torch.empty((rows, top_k), dtype=torch.float32)
    ids = torch.empty((rows, top_k), dtype=torch.int64)
    status = _route(
        rows,
        DTYPES[logits.dtype],
        logits.data_ptr(),
        experts,
        top_k,
        renormalize,
        weights.data_ptr(),
        ids.data_ptr(),
    )
    if status == OUT_OF_MEMORY:
        raise MemoryError("route: no memory for a row")
    return weights, ids


class TiledExperts(NamedTuple):
    """E experts' weights, each tensor with them in the leading dimension."""

    gate_up: Packed  # [2f, d]
    down: Packed  # [d, f]


def _stack(count: int, pack: Callable[[int], Packed]) -> Packed:
    """The weights pack(0) .. pack(count - 1), which differ in nothing but numbers."""
    first = pack(0)
    tensors = [
        None if tensor is None else huge_empty((count, *tensor.shape), tensor.dtype)
        for tensor in (first.weight, first.scales, first.zeros)
    ]
    for index in range(count):
        one = pack(index)
        for whole, part in zip(tensors, (one.weight, one.scales, one.zeros), strict=True):
            if whole is not None:
                whole[index] = part
    weight, scales, zeros = tensors
    return first._replace(weight=weight, scales=scales, zeros=zeros)


def prepare_moe(gate_up: Tensor, down: Tensor) -> TiledExperts:
    """Once per layer: gate_up [E, 2f, d] with the gate in the first f rows, down [E, d, f]."""
    return TiledExperts(*(_stack(len(w), lambda e, w=w: prepare_linear(w[e], None)) for w in (gate_up, down)))


def has_experts(target: Target) -> str | None:
    """The predicate of mixtures whose weights are floats."""
    return usable(target) if target.dtype == torch.float32 else has_tiles(target)


def _one(experts: PackedWeight, index: int) -> PackedWeight:
    zeros = None if experts.zeros is None else experts.zeros[index]
    return replace(experts, codes=experts.codes[index], scales=experts.scales[index], zeros=zeros)


def _prepare(
    gate_up: PackedWeight, down: PackedWeight, prepare: Callable[..., Any]
) -> TiledExperts | int4.PackedExperts:
    for experts in (gate_up, down):
        if (why := refusal(_one(experts, 0))) is not None:
            log.warning("experts [%d, %d] are multiplied by torch: %s", experts.outputs, experts.inputs, why)
            return int4.PackedExperts(gate_up, down)
    return TiledExperts(*(_stack(len(w.codes), lambda e, w=w: prepare(_one(w, e), None)) for w in (gate_up, down)))


def prepare_moe_int8(gate_up: PackedWeight, down: PackedWeight) -> TiledExperts | int4.PackedExperts:
    """Once per layer: E weights [2f, d] with the gate in the first f outputs, and E of [d, f]."""
    return _prepare(gate_up, down, prepare_linear_int8)


def prepare_moe_int4(gate_up: PackedWeight, down: PackedWeight) -> TiledExperts | int4.PackedExperts:
    """Once per layer: E weights [2f, d] with the gate in the first f outputs, and E of [d, f]."""
    return _prepare(gate_up, down, prepare_linear_int4)


def _slots(experts: Packed) -> tuple[int, ...]:
    """The fields of `Experts` in src/moe.h."""
    return (
        experts.kind,
        experts.weight.data_ptr(),
        address(experts.scales),
        address(experts.zeros),
        experts.group,
        experts.inputs,
        experts.outputs,
    )


def _mixture(x: Tensor, packed: TiledExperts, weights: Tensor, ids: Tensor, activation: str) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    weights, ids = weights.float().contiguous(), ids.contiguous()
    gate_up, down = packed
    experts, (rows, top_k) = len(gate_up.weight), ids.shape
    choices = rows * top_k
    lists = torch.empty(3 * (experts + 1) + 1 + 2 * choices, dtype=torch.int64)
    hidden = torch.empty((choices, gate_up.outputs), dtype=x.dtype)
    routed = torch.empty((choices, down.outputs), dtype=x.dtype)
    out = torch.empty((rows, down.outputs), dtype=x.dtype)
    status = _moe(
        rows,
        DTYPES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        experts,
        top_k,
        ids.data_ptr(),
        weights.data_ptr(),
        *_slots(gate_up),
        *_slots(down),
        activation == "gelu",
        lists.data_ptr(),
        hidden.data_ptr(),
        routed.data_ptr(),
        out.data_ptr(),
    )
    if status == OUT_OF_RANGE:
        raise IndexError(f"experts {ids.aminmax()} are not all among the {experts}")
    if status == OUT_OF_MEMORY:
        raise MemoryError("moe: no memory for the working buffers")
    return out


@implements("moe", "native", when=has_experts, prepare=prepare_moe)
def moe(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference. A row's bits do not depend on the others; IndexError for an expert that there is not."""
    return _mixture(x, packed, topk_weights, topk_ids, activation)


@implements("moe_int8", "native", when=has_tiles, prepare=prepare_moe_int8)
def moe_int8(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference; between the products in bf16. Otherwise like `moe`."""
    if isinstance(packed, TiledExperts):
        return _mixture(x, packed, topk_weights, topk_ids, activation)
    return int8.moe_int8(x, packed, topk_weights, topk_ids, activation)


@implements("moe_int4", "native", when=has_tiles, prepare=prepare_moe_int4)
def moe_int4(x: Tensor, packed: Any, topk_weights: Tensor, topk_ids: Tensor, activation: str) -> Tensor:
    """See the reference; between the products in bf16. Otherwise like `moe`."""
    if isinstance(packed, TiledExperts):
        return _mixture(x, packed, topk_weights, topk_ids, activation)
    return int4.moe_int4(x, packed, topk_weights, topk_ids, activation)
