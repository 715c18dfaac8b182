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
from ..kernels.packed import PackedWeight, join_rows, some_inputs, stack_experts
from .errors import EngineStartError
from .layout import Weight
from .linear import Experts, Linear, make_experts, make_linear, make_logits, side_by_side
from .parallel import ALONE, Alone, Group
from .quant.rounding import round_weight
from .quant.scheme import Packing, Storage
from .sharding import WHOLE_ROWS, runs
from .weights import Checkpoint, Source

log = logging.getLogger(__name__)

# (rows [n, K], a Tensor or a PackedWeight; index of the first in the joined matrix) -> such rows, turned
Turn = Callable[[Any, int], Any]


class Reader:
    """rounding: what float matrices become, where something is to; None = they stay floats.
    group: the ranks that share the weights, of which this one reads its part.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        rounding: Packing | None,
        group: Alone = ALONE,
    ) -> None:
        self.checkpoint, self.kernels, self.dtype, self.device = checkpoint, kernels, dtype, device
        self.rounding, self.group = rounding, group

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
            return self.logits_of(self.floats(weight))
        (source,) = self.checkpoint.sources(weight)
        return self.group.logits(make_logits(self.kernels, self._part(source)), weight.shape[0])

    def logits_of(self, rows: Tensor) -> Linear:
        """By a matrix that is there already, such as the embedding."""
        return self.group.logits(make_logits(self.kernels, rows), len(rows))

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

    def row_parallel(self, weight: Weight, bias: Tensor | None, turn: Turn | None = None) -> Linear:
        """`linear` of a weight whose inputs the ranks share: of what it gives, the sum over ranks is the product."""
        (source,) = self.checkpoint.sources(weight)
        if isinstance(self.group, Group) and source.storage is not None and source.storage.packing.ordered:
            return self._in_order(self.group, source, source.storage, bias)
        linear, packing = self.linear(weight, bias, turn), source.storage.packing if source.storage else self.rounding
        return self.group.whole_rows(linear) if packing and packing.format in WHOLE_ROWS else linear

    def _in_order(self, group: Group, source: Source, storage: Storage, bias: Tensor | None) -> Linear:
        """The inputs of a group may be anywhere: each rank takes a run of the order, and picks it out of all inputs."""
        part = source.part
        packed = self.checkpoint.packed(part._replace(cut=None), storage, self.device)
        first, last = runs(packed.inputs, group.size, packed.group)[group.rank]
        try:
            own = some_inputs(packed, first, last - first)
        except ValueError as error:
            raise EngineStartError(
                f"tensor_parallel_size is {group.size}, but {part.name} {list(part.shape)} cannot be cut: {error}; "
                f"give at most {-(-packed.inputs // packed.group)}"
            ) from None
        order = torch.arange(packed.inputs, device=self.device) if packed.order is None else packed.order
        return group.in_order(make_linear(self.kernels, own, bias), order[first:last].contiguous(), part.held[1])

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
        return self.checkpoint.held(part).to(self.device, self.dtype, copy=True)

    def _rounded(self, source: Source, turn: Turn | None = None, first: int = 0) -> Tensor | PackedWeight:
        part, storage = source
        if storage is not None or self.rounding is None:
            stored = self._part(source)
            return stored if turn is None else turn(stored, first)
        why = self.rounding.refuses(*part.held[-2:])
        if why is not None:
            raise EngineStartError(
                f"{self.checkpoint.folder}: tensor {part.name} {list(part.shape)} cannot be {self.rounding.format}: "
                f"{why} (--quantization {self.rounding.format}:GROUP sets the group)"
            )
        cut = part.cut
        # A scale of all inputs is found on all of them, or it would be another one on every rank.
        later = cut is not None and cut.dim == len(part.shape) - 1 and self.rounding.group in (0, part.shape[-1])
        values = self.checkpoint.held(part._replace(cut=None) if later else part).to(self.device)
        packed = round_weight(values if turn is None else turn(values, first), self.rounding)
        return some_inputs(packed, cut.spans[0][0], cut.size) if cut is not None and later else packed

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
