"""How a checkpoint stores its linears: which of them are quantized, what lies there for each, what is made of it.

    quantization_config ──methods.py──▶ Scheme ──storage(name)──▶ Storage ──tensors()──▶ what to look for
                                                                         └──pack()─────▶ PackedWeight

One file per checkpoint format holds its `Storage` and the reading of its configuration.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.packed import PackedWeight, weight_format
from ..config_fields import ConfigFields

FLOATS = ("F64", "F32", "F16", "BF16")  # names of dtypes in safetensors files
SCALES = FLOATS[1:]
MAX_PATTERN = 1000  # characters of a regular expression in a configuration; released ones have fewer than 100


class Packing(NamedTuple):
    """What a weight becomes in memory, as far as its size goes.

    format       a name in kernels/packed.py
    group        inputs per scale, 0 = all
    scale_bytes  of one scale
    zeros        whether it has zero points, of a byte each
    ordered      whether it may have an order of its inputs, of 8 bytes each
    """

    format: str
    group: int = 0
    scale_bytes: int = 4
    zeros: bool = False
    ordered: bool = False

    def nbytes(self, outputs: int, inputs: int) -> int:
        groups = -(-inputs // (self.group or inputs))
        codes = int(outputs * inputs * weight_format(self.format).bits / 8)
        return codes + groups * outputs * (self.scale_bytes + self.zeros) + 8 * inputs * self.ordered

    def refuses(self, outputs: int, inputs: int) -> str | None:
        """Why a weight [outputs, inputs] cannot be packed so, with the nearest that can; None = it can."""
        return weight_format(self.format).refuses(outputs, inputs, self.group)


Axis = tuple[int, int]


def end_to_end(tensor: Tensor, dim: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    """These spans of a dimension; a view where there is one."""
    pieces = [tensor.narrow(dim, first, last - first) for first, last in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class Entry(NamedTuple):
    """One tensor that a checkpoint holds for a linear: its name is the linear's, a dot and `suffix`.

    shapes: those it may have; dtypes: as safetensors files name them
    outputs, inputs: (dimension, how many outputs or inputs one index of it stands for); None = it has no such dimension
    """

    suffix: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    optional: bool = False
    outputs: Axis | None = None
    inputs: Axis | None = None

    def step(self, dim: int) -> int:
        """How many outputs (dim 0) or inputs (1) hang together in it: it can be cut between these."""
        axis = self.inputs if dim else self.outputs
        return 1 if axis is None or self.shapes[-1][axis[0] : axis[0] + 1] in ((), (1,)) else axis[1]

    def cut(self, tensor: Tensor, dim: int, spans: Sequence[tuple[int, int]]) -> Tensor:
        """What belongs to these outputs (dim 0) or inputs (1). ValueError where they begin within a step."""
        axis = self.inputs if dim else self.outputs
        if axis is None or tensor.dim() <= axis[0] or tensor.shape[axis[0]] == 1:
            return tensor
        at, per = axis
        if any(first % per for first, _ in spans):
            raise ValueError(f"{self.suffix}: cannot be cut at {spans}, {per} lie together")
        return end_to_end(tensor, at, [(first // per, -(-last // per)) for first, last in spans])


class Storage(ABC):
    """One way in which a linear lies in a checkpoint."""

    @property
    @abstractmethod
    def packing(self) -> Packing: ...

    @abstractmethod
    def tensors(self, outputs: int, inputs: int) -> tuple[Entry, ...]:
        """What there must be for a weight [outputs, inputs]."""

    @abstractmethod
    def pack(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> PackedWeight:
        """The weight, of the tensors by suffix, which are the caller's to give away. ValueError, with the tensor's
        suffix in front, for values that no weight has."""

    def refuses(self, outputs: int, inputs: int) -> str | None:
        """See `Packing.refuses`; formats that pack several values in a word add their own rule."""
        return self.packing.refuses(outputs, inputs)

    def step(self, outputs: int, inputs: int, dim: int) -> int:
        """How many outputs (dim 0) or inputs (1) hang together: a shard begins and ends between these."""
        return math.lcm(*(entry.step(dim) for entry in self.tensors(outputs, inputs)))


class Rule(NamedTuple):
    """The linears whose whole name the pattern matches are stored so; None = as floats."""

    pattern: re.Pattern[str]
    storage: Storage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A checkpoint's own account of its quantization.

    method     its `quant_method`
    rules      the first that matches a linear's name ("model.layers.0.mlp.up_proj") decides; none = floats
    kv_format  the format of keys and values that it was made for, a name in kernels/kv_formats.py; None = any
    """

    method: str
    rules: tuple[Rule, ...]
    kv_format: str | None = None

    def storage(self, linear: str) -> Storage | None:
        return next((rule.storage for rule in self.rules if rule.pattern.fullmatch(linear)), None)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that weights are packed in, by first appearance."""
        return tuple(dict.fromkeys(rule.storage.packing.format for rule in self.rules if rule.storage))


EVERYTHING = re.compile(".*")
LM_HEAD = re.compile("lm_head")


def named(entry: str) -> re.Pattern[str]:
    """The linears of a module that a configuration names by its path, or by its last parts alone ("gate")."""
    return re.compile(rf"(.*\.)?{re.escape(entry)}(\..*)?")


def expression(fields: ConfigFields, key: str, text: str, prefix: bool) -> re.Pattern[str]:
    """A regular expression from a configuration; `prefix`: a match may end before the name does."""
    try:
        if len(text) > MAX_PATTERN:
            raise re.error(f"longer than {MAX_PATTERN} characters")
        return re.compile(f"(?:{text}).*" if prefix else text)
    except re.error as error:
        fields.refuse(key, f"{text[:60]!r} is no regular expression ({error})")


def unpack_words(words: Tensor, bits: int, dim: int, places: Sequence[int] | None = None) -> Tensor:
    """int32 words [A, B] as their 32 / bits codes, lowest bits first, laid along dim 0 or 1: uint8.

    places: where within its word's stretch each code belongs; None = in order.
    """
    count = 32 // bits
    shape = list(words.shape)
    shape.insert(dim + 1, count)
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for i, place in enumerate(places or range(count)):
        # A right shift of a negative word fills with ones; the mask takes them off.
        codes.select(dim + 1, place).copy_((words >> bits * i) & (1 << bits) - 1)
    return codes.flatten(dim, dim + 1)


def check_scales(suffix: str, scales: Tensor) -> None:
    """ValueError unless all are positive and finite: a zero or NaN would spread through the whole model."""
    wrong = ~(torch.isfinite(scales) & (scales > 0))
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        value = scales[tuple(at)].item()
        raise ValueError(
            f"{suffix}{at}: scales must be positive and finite, this is {value:g}; the file is damaged, download it "
            "again or take another quantization of the model"
        )


def check_no_zeros(suffix: str, tensors: Mapping[str, Tensor]) -> None:
    """Some writers store zero points of symmetric formats, all 0; anything else would be another number format."""
    zeros = tensors.get(suffix)
    if zeros is not None and zeros.float().any():
        raise ValueError(f"{suffix}: must be all 0 in a symmetric format; take a symmetric quantization of the model")
