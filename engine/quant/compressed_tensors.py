"""compressed-tensors checkpoints (llm-compressor): several layouts, and groups of linears that each have their own.

config_groups: {name: {targets, weights: {num_bits, type, strategy, ...}, input_activations: {...} or null}}, ignore
a target is a module's name, its class ("Linear"), or "re:" and an expression that its name begins with
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels.packed import PackedWeight
from ...kernels.reference.fp8 import BLOCK
from ..config_fields import MAX_HIDDEN, ConfigFields
from .fp8 import ONE, Fp8, input_scale
from .integers import FORMATS, integer_weight
from .modelopt import kv_scheme
from .scheme import (
    EVERYTHING,
    SCALES,
    Entry,
    Packing,
    Rule,
    Scheme,
    Storage,
    check_no_zeros,
    check_scales,
    expression,
    unpack_words,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedIntegers(Storage):
    """`pack-quantized`: codes plus half their range, in words along the inputs; zero points in words along the outputs.

    weight_packed [N, K · bits / 32] int32;  weight_scale [N, G];  weight_zero_point [N · bits / 32, G] int32
    """

    bits: int
    group: int  # 0 = all inputs
    symmetric: bool
    ordered: bool

    @property
    def packing(self) -> Packing:
        return Packing(FORMATS[self.bits], self.group, 2, not self.symmetric, self.ordered)

    def tensors(self, outputs: int, inputs: int) -> tuple[Entry, ...]:
        per, group = 32 // self.bits, self.group or inputs
        groups = -(-inputs // group)
        entries = [
            Entry("weight_packed", ((outputs, -(-inputs // per)),), ("I32",), outputs=(0, 1), inputs=(1, per)),
            Entry("weight_scale", ((outputs, groups),), SCALES, outputs=(0, 1), inputs=(1, group)),
            Entry("weight_shape", ((2,),), ("I64", "I32"), optional=True),
        ]
        if not self.symmetric:
            shape = (-(-outputs // per), groups)
            entries.append(Entry("weight_zero_point", (shape,), ("I32",), outputs=(0, per), inputs=(1, group)))
        if self.ordered:
            entries.append(Entry("weight_g_idx", ((inputs,),), ("I32", "I64")))
        return tuple(entries)

    def pack(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> PackedWeight:
        shape = tensors.get("weight_shape")
        if shape is not None and shape.tolist() != [outputs, inputs]:
            raise ValueError(f"weight_shape: says {shape.tolist()}, config.json asks for {[outputs, inputs]}")
        zeros = None
        if not self.symmetric:
            zeros = unpack_words(tensors["weight_zero_point"], self.bits, 0)[:outputs].T.contiguous()
        return integer_weight(
            self.bits,
            unpack_words(tensors["weight_packed"], self.bits, 1)[:, :inputs],
            self.group or inputs,
            tensors["weight_scale"].T,
            zeros,
            tensors.get("weight_g_idx"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainIntegers(Storage):
    """`int-quantized`: weight [N, K] int8 as it is, with weight_scale [1], [N, 1] or [N, G].

    activations: None = left as they are, "dynamic" = in int8 with a scale per token, "static" = with a fixed one
    """

    per: str  # "tensor", "channel" or "group"
    group: int
    activations: str | None

    @property
    def packing(self) -> Packing:
        return Packing("w8a8" if self.activations else "int8", self.group)

    def tensors(self, outputs: int, inputs: int) -> tuple[Entry, ...]:
        group = self.group or inputs
        groups = -(-inputs // group)
        shapes = {"tensor": ONE, "channel": ((outputs, 1), (outputs,)), "group": ((outputs, groups),)}[self.per]
        zeros, by_output = ("I8", "I32", *SCALES), None if self.per == "tensor" else (0, 1)
        by_group = (1, group) if self.per == "group" else None
        entries = [
            Entry("weight", ((outputs, inputs),), ("I8",), outputs=(0, 1), inputs=(1, 1)),
            Entry("weight_scale", shapes, SCALES, outputs=by_output, inputs=by_group),
            Entry("weight_zero_point", shapes, zeros, optional=True, outputs=by_output, inputs=by_group),
        ]
        if self.activations == "static":
            entries.append(Entry("input_scale", ONE, SCALES))
            entries.append(Entry("input_zero_point", ONE, zeros, optional=True))
        return tuple(entries)

    def pack(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> PackedWeight:
        scale = tensors["weight_scale"].float()
        check_scales("weight_scale", scale)
        for zeros in ("weight_zero_point", "input_zero_point"):
            check_no_zeros(zeros, tensors)
        scales = scale.T.contiguous() if self.per == "group" else scale.reshape(1, -1).expand(1, outputs).contiguous()
        return PackedWeight(
            format=self.packing.format,
            outputs=outputs,
            inputs=inputs,
            group=self.group or inputs,
            codes=tensors["weight"],
            scales=scales,
            input_scale=input_scale(tensors),
        )


def read_compressed_tensors(fields: ConfigFields) -> Scheme:
    if fields.has("sparsity_config") and fields.child("sparsity_config").text("format", "dense") != "dense":
        fields.refuse("sparsity_config", "must be dense; take a quantization of the model without sparsity")
    if fields.values.get("transform_config"):
        fields.refuse("transform_config", "is not supported; take a quantization of the model without transforms")
    rules = [Rule(_target(fields, "ignore", entry), None) for entry in fields.texts("ignore")]
    groups = fields.child("config_groups")
    for name in groups.values:
        group = groups.child(name)
        storage = _storage(group, group.text("format", fields.text("format", "")))
        rules += [Rule(_target(group, "targets", entry), storage) for entry in group.texts("targets")]
    return Scheme(method="compressed-tensors", rules=tuple(rules), kv_format=kv_scheme(fields))


def _target(fields: ConfigFields, key: str, entry: str) -> re.Pattern[str]:
    if entry == "Linear":
        return EVERYTHING
    if entry.startswith("re:"):
        return expression(fields, key, entry.removeprefix("re:"), prefix=True)
    return re.compile(re.escape(entry))


def _storage(group: ConfigFields, layout: str) -> Storage:
    if layout not in LAYOUTS:
        group.refuse("format", f"the layout is {layout!r}; supported are {', '.join(LAYOUTS)}")
    if group.has("output_activations"):
        group.refuse("output_activations", "must be null; take a quantization of the model without it")
    weights = group.child("weights")
    if weights.flag("dynamic", False):
        weights.refuse("dynamic", "must be false: weights are quantized beforehand")
    return LAYOUTS[layout](group, weights)


def _group_size(weights: ConfigFields, strategies: tuple[str, ...]) -> int:
    """Inputs per scale; 0 = all of them."""
    strategy = weights.text("strategy")
    if strategy not in strategies:
        weights.refuse("strategy", f"must be {' or '.join(strategies)}; take such a quantization of the model")
    return weights.integer("group_size", 1, MAX_HIDDEN) if strategy == "group" else 0


def _activations(group: ConfigFields, kind: str) -> str | None:
    """None, "dynamic" or "static". A scale per token serves what asks for one per step: it is the finer one."""
    if not group.has("input_activations"):
        return None
    activations = group.child("input_activations")
    if activations.text("type", "int") != kind or activations.integer("num_bits", 1, 32) != 8:
        group.refuse("input_activations", f"must be eight-bit ({kind}) as the weights are, or null")
    if not activations.flag("symmetric", True):
        activations.refuse("symmetric", "must be true; take a quantization of the model with symmetric activations")
    dynamic = activations.flag("dynamic", False)
    allowed = ("token", "tensor", "group") if dynamic else ("tensor",)
    if activations.text("strategy", "tensor") not in allowed:
        activations.refuse("strategy", f"must be {' or '.join(allowed)}")
    return "dynamic" if dynamic else "static"


def _read_packed(group: ConfigFields, weights: ConfigFields) -> Storage:
    bits = weights.integer("num_bits", 1, 32)
    if weights.text("type", "int") != "int" or bits not in FORMATS:
        weights.refuse("num_bits", "must be 4 or 8, of type int; take such a quantization of the model")
    if group.has("input_activations"):
        group.refuse("input_activations", "must be null with pack-quantized; int-quantized has eight-bit activations")
    ordering = weights.text("actorder", "none")
    if ordering not in ("none", "group", "dynamic", "weight", "static"):
        weights.refuse("actorder", "must be group, weight or null")
    return PackedIntegers(
        bits=bits,
        group=_group_size(weights, ("group", "channel")),
        symmetric=weights.flag("symmetric", True),
        ordered=ordering in ("group", "dynamic"),
    )


def _read_plain(group: ConfigFields, weights: ConfigFields) -> Storage:
    if weights.text("type", "int") != "int" or weights.integer("num_bits", 1, 32) != 8:
        weights.refuse("num_bits", "must be 8, of type int; four bits are pack-quantized")
    if not weights.flag("symmetric", True):
        weights.refuse("symmetric", "must be true; eight-bit weights have no zero points here")
    activations = _activations(group, "int")
    strategies = ("channel", "tensor") if activations else ("channel", "tensor", "group")
    size = _group_size(weights, strategies)
    return PlainIntegers(per=weights.text("strategy"), group=size, activations=activations)


def _read_float(group: ConfigFields, weights: ConfigFields) -> Storage:
    if weights.text("type", "float") != "float" or weights.integer("num_bits", 1, 32) != 8:
        weights.refuse("num_bits", "must be 8, of type float")
    activations = _activations(group, "float")
    if activations is None:
        group.refuse("weights", "eight-bit floats with plain activations are not supported; take int8 or FP8 dynamic")
    per = weights.text("strategy")
    if per not in ("tensor", "channel", "block"):
        weights.refuse("strategy", "must be tensor, channel or block")
    if per == "block" and weights.integers("block_structure", 1, 1 << 20) != [BLOCK, BLOCK]:
        weights.refuse("block_structure", f"must be [{BLOCK}, {BLOCK}]")
    if per == "block" and activations == "static":
        group.refuse("input_activations", "must be dynamic where weights have a scale per block")
    return Fp8(per=per, static=activations == "static")


LAYOUTS: dict[str, Callable[[ConfigFields, ConfigFields], Storage]] = {
    "pack-quantized": _read_packed,
    "int-quantized": _read_plain,
    "float-quantized": _read_float,
}
