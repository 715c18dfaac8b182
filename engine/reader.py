"""Parameters out of a checkpoint, in the form in which they will be multiplied: floats, packed, or rounded on the way.

Weight ──sources──▶ parts ──▶ Tensor ───rounding──▶ PackedWeight ──join by rows──▶ Linear
                         └──▶ PackedWeight (a quantized checkpoint's) ──▶ ┘
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import Kernels
from ..kernels.packed import PackedWeight, join_rows, stack_experts
from .errors import EngineStartError
from .layout import Weight
from .linear import Experts, Linear, make_experts, make_linear, make_logits, side_by_side
from .quant.rounding import round_weight
from .quant.scheme import Packing
from .weights import Checkpoint, Source

log = logging.getLogger(__name__)

# (rows [n, K], a Tensor or a PackedWeight; index of the first in the joined matrix) -> such rows, turned
Turn = Callable[[Any, int], Any]


class Reader:
    """rounding: what float matrices become, where something is to; None = they stay floats."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        rounding: Packing | None,
    ) -> None:
        self.checkpoint, self.kernels, self.dtype, self.device = checkpoint, kernels, dtype, device
        self.rounding = rounding

    def floats(self, weight: Weight) -> Tensor:
        return self.checkpoint.read(weight, self.dtype, self.device)

    def optional(self, weight: Weight | None) -> Tensor | None:
        return None if weight is None else self.floats(weight)

    def is_plain(self, weight: Weight) -> bool:
        """Whether all of it is stored as floats."""
        return all(source.storage is None for source in self.checkpoint.sources(weight))

    def logits(self, weight: Weight) -> Linear:
        """The logits' matrix, never rounded."""
        if self.is_plain(weight):
            return make_logits(self.kernels, self.floats(weight))
        (source,) = self.checkpoint.sources(weight)
        return make_logits(self.kernels, self._part(source))

    def as_stored(self, weight: Weight) -> Linear:
        """A linear without a bias that is never rounded: routers, the gate of a shared expert."""
        if self.is_plain(weight):
            return make_linear(self.kernels, self.floats(weight), None)
        return self._joined([self._part(source) for source in self.checkpoint.sources(weight)], None)

    def linear(self, weight: Weight, bias: Tensor | None, turn: Turn | None = None) -> Linear:
        """turn: what is done to each part before anything else: to floats as they are stored, to others packed."""
        if self.rounding is None and self.is_plain(weight):
            values = self.floats(weight)
            return make_linear(self.kernels, values if turn is None else turn(values, 0).to(self.dtype), bias)
        parts, first = [], 0
        for source in self.checkpoint.sources(weight):
            parts.append(self._rounded(source, turn, first))
            first += source.part.shape[0]
        return self._joined(parts, bias)

    def experts(self, gate_up: Weight, down: Weight) -> Experts:
        """Of [E, 2f, d] and [E, d, f]."""
        try:
            return make_experts(self.kernels, self._stacked(gate_up), self._stacked(down))
        except ValueError as error:
            name = self.checkpoint.sources(gate_up)[0].part.name
            raise EngineStartError(
                f"{self.checkpoint.folder}: tensor {name} and its siblings: {error}; "
                "take a quantization of the model that treats experts alike, without act-order"
            ) from None

    def _stacked(self, weight: Weight) -> Tensor | PackedWeight:
        sources = self.checkpoint.sources(weight)
        if self.rounding is None and self.is_plain(weight):
            return self.floats(weight)
        if len(sources[0].part.shape) == 3:  # stored as one tensor of all experts
            return self._rounded(sources[0])
        count = len(sources) // weight.shape[0]
        joined = []
        for i in range(0, len(sources), count):
            parts = [self._rounded(source) for source in sources[i : i + count]]
            packed = [part for part in parts if isinstance(part, PackedWeight)]
            if len(packed) < len(parts):
                raise ValueError("some are stored as floats and some are not")
            joined.append(join_rows(packed))
        return stack_experts(joined)

    def _part(self, source: Source) -> Tensor | PackedWeight:
        part, storage = source
        if storage is not None:
            return self.checkpoint.packed(part, storage, self.device)
        return self.checkpoint.tensor(part.name).to(self.device, self.dtype, copy=True)

    def _rounded(self, source: Source, turn: Turn | None = None, first: int = 0) -> Tensor | PackedWeight:
        part, storage = source
        if storage is not None or self.rounding is None:
            stored = self._part(source)
            return stored if turn is None else turn(stored, first)
        why = self.rounding.refuses(*part.shape[-2:])
        if why is not None:
            raise EngineStartError(
                f"{self.checkpoint.folder}: tensor {part.name} {list(part.shape)} cannot be {self.rounding.format}: "
                f"{why} (--quantization {self.rounding.format}:GROUP sets the group)"
            )
        values = self.checkpoint.tensor(part.name).to(self.device)
        return round_weight(values if turn is None else turn(values, first), self.rounding)

    def _joined(self, parts: list[Tensor | PackedWeight], bias: Tensor | None) -> Linear:
        """One linear of parts, joined in memory where their formats allow it."""
        joined = self._join(parts)
        if joined is not None:
            return make_linear(self.kernels, joined, bias)
        rows = [part.outputs if isinstance(part, PackedWeight) else part.shape[0] for part in parts]
        biases = [None] * len(parts) if bias is None else bias.split(rows)
        return side_by_side([make_linear(self.kernels, part, own) for part, own in zip(parts, biases, strict=True)])

    def _join(self, parts: list[Tensor | PackedWeight]) -> PackedWeight | None:
        packed = [part for part in parts if isinstance(part, PackedWeight)]
        if len(packed) < len(parts):
            return None
        try:
            return join_rows(packed)
        except ValueError as error:
            log.info("multiplied one by one: %s", error)
            return None
