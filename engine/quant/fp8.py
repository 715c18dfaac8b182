"""Weights in float8 e4m3: one scale for all, one per output, or one per 128 x 128 block.

    weight [N, K] e4m3;  weight_scale [], [1] or [N, 1], or weight_scale_inv [⌈N/128⌉, ⌈K/128⌉];  input_scale [], [1]

Scales multiply, that which is called inverse too. Scales of a whole matrix become one per output, so that matrices with
their own can be joined by rows without touching their codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels.packed import PackedWeight
from ...kernels.reference.fp8 import BLOCK, pack_blocks
from ..config_fields import ConfigFields
from .scheme import (
    EVERYTHING,
    LM_HEAD,
    SCALES,
    Entry,
    Packing,
    Rule,
    Scheme,
    Storage,
    check_no_zeros,
    check_scales,
    named,
)

ONE = ((), (1,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8(Storage):
    """per: what a scale is for: "tensor", "channel" (an output) or "block". static: activations have a fixed scale."""

    per: str
    static: bool = False
    scale: str = "weight_scale"

    @property
    def packing(self) -> Packing:
        return Packing("fp8_block", BLOCK) if self.per == "block" else Packing("fp8")

    def tensors(self, outputs: int, inputs: int) -> tuple[Entry, ...]:
        shapes = {
            "tensor": ONE,
            "channel": ((outputs, 1), (outputs,)),
            "block": ((-(-outputs // BLOCK), -(-inputs // BLOCK)),),
        }[self.per]
        by_output = {"tensor": None, "channel": (0, 1), "block": (0, BLOCK)}[self.per]
        by_input = (1, BLOCK) if self.per == "block" else None
        zeros = ("F8_E4M3", "I8", *SCALES)
        entries = [
            Entry("weight", ((outputs, inputs),), ("F8_E4M3",), outputs=(0, 1), inputs=(1, 1)),
            Entry(self.scale, shapes, SCALES, outputs=by_output, inputs=by_input),
            Entry("weight_zero_point", (*ONE, (outputs, 1)), zeros, optional=True, outputs=(0, 1)),
        ]
        if self.static:
            entries.append(Entry("input_scale", ONE, SCALES))
            entries.append(Entry("input_zero_point", ONE, zeros, optional=True))
        return tuple(entries)

    def step(self, outputs: int, inputs: int, dim: int) -> int:
        """Activations are quantized by blocks too, so none is cut even where it is the only one."""
        return BLOCK if self.per == "block" and dim == 1 else Storage.step(self, outputs, inputs, dim)

    def pack(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> PackedWeight:
        scale = tensors[self.scale].float()
        check_scales(self.scale, scale)
        for zeros in ("weight_zero_point", "input_zero_point"):
            check_no_zeros(zeros, tensors)
        if self.per == "block":
            return pack_blocks(tensors["weight"], scale)
        return PackedWeight(
            format="fp8",
            outputs=outputs,
            inputs=inputs,
            group=inputs,
            codes=tensors["weight"],
            scales=scale.reshape(1, -1).expand(1, outputs).contiguous(),
            input_scale=input_scale(tensors),
        )


def input_scale(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The fixed scale of the activations, [] fp32, where there is one."""
    if "input_scale" not in tensors:
        return None
    scale = tensors["input_scale"].float().reshape(())
    check_scales("input_scale", scale)
    return scale


def read_fp8(fields: ConfigFields) -> Scheme:
    """`quant_method: fp8`, of two writers: DeepSeek and transformers (blocks), AutoFP8 (whole matrices)."""
    static = _activations(fields) == "static"
    if fields.has("kv_cache_scheme"):
        fields.refuse("kv_cache_scheme", "is not supported with quant_method fp8; remove the key")
    if fields.has("weight_block_size"):
        if fields.integers("weight_block_size", 1, 1 << 20) != [BLOCK, BLOCK]:
            fields.refuse("weight_block_size", f"must be [{BLOCK}, {BLOCK}]; take such a quantization of the model")
        if static:
            fields.refuse("activation_scheme", "must be dynamic where weights have a scale per block")
        storage = Fp8(per="block", scale="weight_scale_inv")
    else:
        storage = Fp8(per="tensor", static=static)
    entries = [*fields.texts("modules_to_not_convert"), *fields.texts("ignored_layers")]
    kept = [Rule(named(entry), None) for entry in entries]
    return Scheme(method="fp8", rules=(*kept, Rule(LM_HEAD, None), Rule(EVERYTHING, storage)))


def _activations(fields: ConfigFields) -> str:
    if fields.text("fmt", "e4m3") != "e4m3":
        fields.refuse("fmt", "must be e4m3")
    scheme = fields.text("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        fields.refuse("activation_scheme", "must be dynamic or static")
    return scheme
