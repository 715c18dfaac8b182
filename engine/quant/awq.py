"""AWQ checkpoints (Lin et al. 2023, as AutoAWQ's "gemm" version writes them): codes packed along the outputs.

qweight [K, N / 8] int32: nibble i of word c is output 8c + PLACES[i];  qzeros [G, N / 8] alike;  scales [G, N]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels.packed import PackedWeight
from ..config_fields import MAX_HIDDEN, ConfigFields
from .integers import integer_weight
from .scheme import EVERYTHING, LM_HEAD, SCALES, Entry, Packing, Rule, Scheme, Storage, named, unpack_words

PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(Storage):
    group: int  # 0 = all inputs

    @property
    def packing(self) -> Packing:
        return Packing("int4", self.group, 2, zeros=True)

    def refuses(self, outputs: int, inputs: int) -> str | None:
        if outputs % PER_WORD:
            return f"{outputs} outputs must be a multiple of {PER_WORD}, which a word of AWQ holds"
        return self.packing.refuses(outputs, inputs)

    def tensors(self, outputs: int, inputs: int) -> tuple[Entry, ...]:
        group = self.group or inputs
        groups = -(-inputs // group)
        return (
            Entry("qweight", ((inputs, outputs // PER_WORD),), ("I32",), outputs=(1, PER_WORD), inputs=(0, 1)),
            Entry("qzeros", ((groups, outputs // PER_WORD),), ("I32",), outputs=(1, PER_WORD), inputs=(0, group)),
            Entry("scales", ((groups, outputs),), SCALES, outputs=(1, 1), inputs=(0, group)),
        )

    def pack(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> PackedWeight:
        codes = unpack_words(tensors["qweight"], 4, 1, PLACES).T
        zeros = unpack_words(tensors["qzeros"], 4, 1, PLACES)
        return integer_weight(4, codes, self.group or inputs, tensors["scales"], zeros, None)


def read_awq(fields: ConfigFields) -> Scheme:
    """Both spellings of its keys are in use: bits and w_bit, group_size and q_group_size."""
    bits, group, version = (
        short if fields.has(short) or not fields.has(long) else long
        for short, long in (("bits", "w_bit"), ("group_size", "q_group_size"), ("version", "version"))
    )
    if fields.integer(bits, 1, 32, 4) != 4:
        fields.refuse(bits, "must be 4; take a four-bit quantization of the model")
    if fields.text(version, "gemm").lower() != "gemm":
        fields.refuse(version, 'must be "gemm"; take that version of the model')
    if not fields.flag("zero_point", True):
        fields.refuse("zero_point", "must be true; take an AWQ model with zero points, or a symmetric GPTQ one")
    size = fields.integer(group, -1, MAX_HIDDEN, 128)
    if size == 0:
        fields.refuse(group, "must be positive, or -1 for all inputs")
    kept = [Rule(named(entry), None) for entry in fields.texts("modules_to_not_convert")]
    return Scheme(method="awq", rules=(*kept, Rule(LM_HEAD, None), Rule(EVERYTHING, Awq(group=max(size, 0)))))
