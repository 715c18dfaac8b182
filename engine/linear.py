"""A layer's product with its weight, whatever the weight is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.packed import PackedWeight, QuantizedRows, RowFormat, weight_format

Rows = Tensor | QuantizedRows  # activations [T, K], plain or quantized by what made them


class Linear:
    """x · weightᵀ + bias: [T, K] -> [T, N], by the op of the weight's format.

    rows: how it wants its activations; a norm or an activation before it then quantizes them in passing. None = plain.
    """

    __slots__ = ("packed", "rows", "run")

    def __init__(self, run: Callable[[Any, Any], Tensor], packed: Any, rows: RowFormat | None = None) -> None:
        """run and packed: an op and what its `prepare` made."""
        self.run, self.packed, self.rows = run, packed, rows

    def __call__(self, x: Rows) -> Tensor:
        return self.run(x, self.packed)


def make_linear(kernels: Kernels, weight: Tensor | PackedWeight, bias: Tensor | None) -> Linear:
    """weight [N, K], bias [N] or None. The caller drops its own reference to the weight."""
    if isinstance(weight, Tensor):
        return Linear(kernels.linear.run, kernels.linear.prepare(weight, bias))
    form = weight_format(weight.format)
    op = getattr(kernels, form.linear)
    return Linear(op.run, op.prepare(weight, bias), form.rows(weight))


def make_logits(kernels: Kernels, weight: Tensor | PackedWeight) -> Linear:
    """weight [V, d]: hidden rows to logits in fp32, [L, d] -> [L, V]."""
    if isinstance(weight, Tensor):
        return Linear(kernels.logits.run, kernels.logits.prepare(weight, None))
    narrow = make_linear(kernels, weight, None)
    return Linear(lambda x, linear: linear(x).float(), narrow)


class Experts(NamedTuple):
    """The op of the experts' format with their weights: run(x, packed, topk_weights, topk_ids, activation)."""

    run: Callable[..., Tensor]
    packed: Any


def make_experts(kernels: Kernels, gate_up: Tensor | PackedWeight, down: Tensor | PackedWeight) -> Experts:
    """gate_up: E of [2f, d], down: E of [d, f], of one format. ValueError where the formats differ."""
    formats = [None if isinstance(weight, Tensor) else weight.format for weight in (gate_up, down)]
    if formats[0] != formats[1]:
        names = " and ".join(name or "floats" for name in formats)
        raise ValueError(f"gate_up and down of a mixture's experts must have one format, these have {names}")
    op = kernels.moe if formats[0] is None else getattr(kernels, weight_format(formats[0]).moe)
    return Experts(op.run, op.prepare(gate_up, down))


def side_by_side(parts: Sequence[Linear]) -> Linear:
    """One linear with the outputs of several: weights whose formats cannot be joined in memory (q, k and v of a model
    that keeps one of them in floats)."""

    def run(x: Tensor, linears: Sequence[Linear]) -> Tensor:
        return torch.cat([linear(x) for linear in linears], dim=-1)

    return Linear(run, tuple(parts))
