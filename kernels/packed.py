"""Quantized weights as they lie in memory, and the formats of which they are: each found by name.

    weight [N, K] ──quantize──▶ PackedWeight ──▶ linear_<format>, moe_<format>
                    checkpoints ──▶ ┘        └──dequantize──▶ [N, K] fp32, the oracle of every kernel

A new format is a reference file that calls `register` and declares its ops; no caller changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How a product wants its activations: codes, with one scale per row and `group` inputs (0 = the whole row).

    scale: a fixed one, [] fp32 (static quantization); None = from each row itself.
    """

    codes: torch.dtype  # int8 or float8_e4m3fn
    group: int = 0
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations x ≈ codes · scales."""

    codes: Tensor  # [T, K]
    scales: Tensor  # [T, G] fp32; G = 1, or ceil(K / group)
    dtype: torch.dtype  # what x was, and what a product gives back


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K], or E of them, in one of the formats: w[n, k] from its code, scale and zero.

    group   inputs per scale: the scale of w[n, k] is scales[k // group, n]; G = ceil(K / group)
    order   None, or [K] int64: column j of the codes belongs to input order[j] (act-order checkpoints)
    input_scale  None, or [] fp32: the checkpoint's static scale of the activations
    """

    format: str
    outputs: int  # N
    inputs: int  # K
    group: int
    codes: Tensor  # [(E,) ...] as the format says
    scales: Tensor  # [(E,) G, N] floating point
    zeros: Tensor | None = None  # [(E,) G, N] uint8; None = the format's own zero
    order: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros, self.order) if t is not None)


Refusal = str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How weights of one name are made and read.

    quantize    (weight [N, K], group or None for the format's usual one) -> PackedWeight, round to nearest
    dequantize  PackedWeight -> [(E,) N, K] fp32
    rows        PackedWeight -> what its product wants of activations, None = plain ones
    refuses     (N, K, group) -> why such a weight cannot be stored, with the nearest that can; None = it can
    group       the usual one; 0 = all inputs
    scale_bytes, zeros  of a scale, and whether there are zero points, in what `quantize` makes
    output_dim  the dimension of `codes` that N is on, counted from the end, of two: joins of rows are laid along it
    interleaved  group -> inputs whose codes lie among each other
    capability  the least GPU that multiplies it, as (9, 0); what it is called is in `gpu`
    """

    name: str
    quantize: Callable[[Tensor, int | None], PackedWeight]
    dequantize: Callable[[PackedWeight], Tensor]
    refuses: Callable[[int, int, int], Refusal]
    bits: float  # of a code
    output_dim: int
    interleaved: Callable[[int], int] = lambda group: 1
    rows: Callable[[PackedWeight], RowFormat | None] = lambda weight: None
    group: int = 0
    scale_bytes: int = 4
    zeros: bool = False
    capability: tuple[int, int] = (8, 0)
    gpu: str = "Ampere"

    @property
    def linear(self) -> str:
        """The op that multiplies by such weights."""
        return f"linear_{self.name}"

    @property
    def moe(self) -> str:
        return f"moe_{self.name}"


_FORMATS: dict[str, WeightFormat] = {}


def register(weight_format: WeightFormat) -> WeightFormat:
    if weight_format.name in _FORMATS:
        raise ValueError(f"weight format {weight_format.name!r} is registered twice")
    _FORMATS[weight_format.name] = weight_format
    return weight_format


def weight_format(name: str) -> WeightFormat:
    """ValueError with the choices for an unknown name."""
    if name not in _FORMATS:
        raise ValueError(f"unknown weight format {name!r}; choose from {', '.join(_FORMATS)}")
    return _FORMATS[name]


def weight_formats() -> tuple[str, ...]:
    return tuple(_FORMATS)


def join_rows(parts: Sequence[PackedWeight]) -> PackedWeight:
    """The weight whose outputs are those of the parts, one after the other (q, k, v; gate, up).

    A static input scale of the whole is the largest of the parts'. ValueError where formats, groups, orders or the
    presence of zeros differ.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        same = (part.format, part.inputs, part.group) == (first.format, first.inputs, first.group)
        if not same or (part.zeros is None) != (first.zeros is None) or not _equal(part.order, first.order):
            raise ValueError(
                f"weights of {first.outputs} and {part.outputs} outputs cannot be joined: format, group and order must "
                f"agree ({first.format}/{first.group} and {part.format}/{part.group})"
            )
    input_scales = [part.input_scale for part in parts if part.input_scale is not None]
    if len(input_scales) not in (0, len(parts)):
        raise ValueError("some of the joined weights have a static input scale and some have none")
    return replace(
        first,
        outputs=sum(part.outputs for part in parts),
        codes=torch.cat([part.codes for part in parts], dim=weight_format(first.format).output_dim),
        scales=torch.cat([part.scales for part in parts], dim=-1),
        zeros=None if first.zeros is None else torch.cat([part.zeros for part in parts], dim=-1),  # type: ignore[misc]
        input_scale=torch.stack(input_scales).amax() if input_scales else None,
    )


def select_rows(weight: PackedWeight, outputs: Tensor) -> PackedWeight:
    """The weight of these outputs [n] int64 alone."""
    return replace(
        weight,
        outputs=len(outputs),
        codes=weight.codes.index_select(weight_format(weight.format).output_dim, outputs),
        scales=weight.scales.index_select(-1, outputs),
        zeros=None if weight.zeros is None else weight.zeros.index_select(-1, outputs),
    )


def first_inputs(weight: PackedWeight, count: int) -> PackedWeight:
    """The weight on its first `count` inputs alone. ValueError where codes or scales of these are those of others."""
    if weight.order is not None:
        raise ValueError("its inputs are in an order of their own (act-order), so the first ones are in all groups")
    return some_inputs(weight, 0, count)


def some_inputs(weight: PackedWeight, first: int, count: int) -> PackedWeight:
    """The weight on `count` inputs from `first` on, as its codes lie: of an `order` these are order[first : ...], and
    the result has none. ValueError where codes or scales of these are those of others."""
    form = weight_format(weight.format)
    group = weight.group
    if group == weight.inputs and form.refuses(weight.outputs, count, group) is not None:
        group = count  # the one scale of all inputs is that of these
    whole = form.interleaved(group) == form.interleaved(weight.group) and first % form.interleaved(group) == 0
    whole = whole and (group == count or first % group == 0)
    if not whole or form.refuses(weight.outputs, count, group) is not None:
        which = (
            f"its first {count} inputs end" if first == 0 else f"its inputs {first} to {first + count - 1} begin or end"
        )
        raise ValueError(f"{which} in the middle of a group of {weight.group}")
    groups = slice(0, 1) if weight.scales.shape[-2] == 1 else slice(first // group, -(-(first + count) // group))
    input_dim = -3 - form.output_dim
    stored = weight.codes.shape[input_dim]
    return replace(
        weight,
        inputs=count,
        group=group,
        codes=weight.codes.narrow(
            input_dim, stored * first // weight.inputs, stored * count // weight.inputs
        ).contiguous(),
        scales=weight.scales[..., groups, :].contiguous(),
        zeros=None if weight.zeros is None else weight.zeros[..., groups, :].contiguous(),
        order=None,
    )


def stack_experts(parts: Sequence[PackedWeight]) -> PackedWeight:
    """E weights of one shape and format as one, in the leading dimension. ValueError where they differ."""
    first = parts[0]
    for part in parts:
        if (part.format, part.outputs, part.inputs, part.group) != (
            first.format,
            first.outputs,
            first.inputs,
            first.group,
        ) or part.order is not None:
            raise ValueError("experts must have one shape, format and group, and no column order of their own")
    if any((part.zeros is None) != (first.zeros is None) for part in parts):
        raise ValueError("experts must all have zero points, or none")
    input_scales = [part.input_scale for part in parts if part.input_scale is not None]
    return replace(
        first,
        codes=torch.stack([part.codes for part in parts]),
        scales=torch.stack([part.scales for part in parts]),
        zeros=None if first.zeros is None else torch.stack([part.zeros for part in parts]),  # type: ignore[misc]
        input_scale=torch.stack(input_scales).amax() if input_scales else None,
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def spread(scales: Tensor, group: int, inputs: int) -> Tensor:
    """Per-group values [(E,) G, N] as one per weight: [(E,) N, K]."""
    index = torch.arange(inputs, device=scales.device) // group
    return scales.float().index_select(-2, index).transpose(-1, -2)


def all_of(inputs: int, group: int) -> int:
    """A group of 0 is all inputs."""
    return group or inputs
