"""GPTQ checkpoints (Frantar et al. 2022, as AutoGPTQ and GPTQModel write them): codes packed along the inputs.

qweight [K · bits / 32, N] int32: input k is at bits `bits · (k mod per)` of word k // per, per = 32 / bits
qzeros  [G, N · bits / 32] int32, packed along the outputs; the first version of the format stores zero - 1
scales  [G, N];  g_idx [K]: the group of each input
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ...kernels.packed import PackedWeight
from ..config_fields import MAX_HIDDEN, ConfigFields
from .integers import FORMATS, integer_weight
from .scheme import EVERYTHING, LM_HEAD, SCALES, Entry, Packing, Rule, Scheme, Storage, expression, unpack_words

VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Storage):
    bits: int
    group: int  # 0 = all inputs
    symmetric: bool
    ordered: bool  # desc_act
    zero_offset: int

    @property
    def packing(self) -> Packing:
        return Packing(FORMATS[self.bits], self.group, 2, not self.symmetric, self.ordered)

    def refuses(self, outputs: int, inputs: int) -> str | None:
        per = 32 // self.bits
        if outputs % per or inputs % per:
            return f"{outputs} outputs and {inputs} inputs must be multiples of {per}, which a word of GPTQ holds"
        return self.packing.refuses(outputs, inputs)

    def tensors(self, outputs: int, inputs: int) -> tuple[Entry, ...]:
        per, group = 32 // self.bits, self.group or inputs
        groups = -(-inputs // group)
        return (
            Entry("qweight", ((inputs // per, outputs),), ("I32",), outputs=(1, 1), inputs=(0, per)),
            Entry("qzeros", ((groups, outputs // per),), ("I32",), outputs=(1, per), inputs=(0, group)),
            Entry("scales", ((groups, outputs),), SCALES, outputs=(1, 1), inputs=(0, group)),
            Entry("g_idx", ((inputs,),), ("I32", "I64"), optional=not self.ordered),
        )

    def pack(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> PackedWeight:
        codes = unpack_words(tensors["qweight"], self.bits, 0).T
        zeros = self._zeros(unpack_words(tensors["qzeros"], self.bits, 1))
        return integer_weight(self.bits, codes, self.group or inputs, tensors["scales"], zeros, tensors.get("g_idx"))

    def _zeros(self, stored: Tensor) -> Tensor | None:
        """[G, N] uint8; None where all are half the range.

        Files of either version call themselves "gptq": a symmetric one tells by its zeros, which are half - 1 or half.
        """
        half = 1 << self.bits - 1
        if self.symmetric and (bool((stored == half - 1).all()) or bool((stored == half).all())):
            return None
        return stored + self.zero_offset & (1 << self.bits) - 1


def read_gptq(fields: ConfigFields) -> Scheme:
    """Refuses bits and layouts that no kernel multiplies."""
    version = fields.text("checkpoint_format", "gptq")
    if version not in VERSIONS:
        fields.refuse("checkpoint_format", f"must be {' or '.join(VERSIONS)}; take such a quantization of the model")
    if fields.flag("is_marlin_format", False):
        fields.refuse("is_marlin_format", "must be false; take the model in the usual GPTQ layout")
    if fields.text("pack_dtype", "int32") != "int32":
        fields.refuse("pack_dtype", "must be int32")
    usual = Gptq(
        bits=_bits(fields, None),
        group=_group(fields, None),
        symmetric=fields.flag("sym", True),
        ordered=fields.flag("desc_act", False),
        zero_offset=VERSIONS[version],
    )
    rules = _exceptions(fields, usual)
    if not fields.flag("lm_head", False):
        rules.append(Rule(LM_HEAD, None))
    return Scheme(method="gptq", rules=(*rules, Rule(EVERYTHING, usual)))


def _bits(fields: ConfigFields, default: int | None) -> int:
    bits = fields.integer("bits", 1, 32, default)
    if bits not in FORMATS:
        fields.refuse("bits", "must be 4 or 8; take such a quantization of the model")
    return bits


def _group(fields: ConfigFields, default: int | None) -> int:
    size = fields.integer("group_size", -1, MAX_HIDDEN, default)
    if size == 0:
        fields.refuse("group_size", "must be positive, or -1 for all inputs")
    return max(size, 0)


def _exceptions(fields: ConfigFields, usual: Gptq) -> list[Rule]:
    """`dynamic` of GPTQModel: {"-:expression": left in floats, "+:expression" or "expression": other settings}."""
    rules: list[Rule] = []
    if not fields.has("dynamic"):
        return rules
    exceptions = fields.child("dynamic")
    for key in exceptions.values:
        pattern = expression(fields, "dynamic", key.removeprefix("-:").removeprefix("+:"), prefix=True)
        if key.startswith("-:"):
            rules.append(Rule(pattern, None))
            continue
        own = exceptions.child(key)
        changed = replace(
            usual,
            bits=_bits(own, usual.bits),
            group=_group(own, usual.group or -1),
            symmetric=own.flag("sym", usual.symmetric),
            ordered=own.flag("desc_act", usual.ordered),
        )
        rules.append(Rule(pattern, changed))
    return rules
