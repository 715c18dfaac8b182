"""Products with weights in codes of eight and four bits and plain activations; see src/linear.h.

A weight whose columns are in an order of their own (act-order) is packed in the order of its inputs where that keeps
each group of a scale together. Where it does not, the reference's way serves it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...packed import PackedWeight
from ...reference import int4, int8
from ...registry import implements
from .library import usable
from .linear import INPUTS, INT4, INT8, OUTPUTS, Packed, as_tiles, multiply, padded_bias
from .pages import huge_empty

log = logging.getLogger(__name__)


def refusal(weight: PackedWeight) -> str | None:
    """Why such a weight cannot be laid out; None = it can."""
    if weight.codes.dim() != 2:
        return "it holds several experts"
    if weight.group < weight.inputs and weight.group % INPUTS:
        return f"its groups of {weight.group} inputs are no multiple of {INPUTS}"
    if weight.order is not None and _groups_in_order(weight.order, weight.group) is None:
        return "its column order (act-order) tears groups apart"
    return None


def _groups_in_order(order: Tensor, group: int) -> Tensor | None:
    """[G]: which group of columns has the first, second, ... group of inputs; None where a group is torn apart."""
    groups = [(part // group).unique() for part in order.split(group)]
    return torch.cat(groups).argsort() if all(len(part) == 1 for part in groups) else None


def prepare_linear_int8(weight: PackedWeight, bias: Tensor | None) -> Packed | int8.PackedLinear:
    """Once per weight, bias [N] or None. The caller drops its own reference to the weight."""
    if (why := refusal(weight)) is not None:
        log.warning("an int8 weight [%d, %d] is multiplied by torch: %s", weight.outputs, weight.inputs, why)
        return int8.prepare_linear_int8(weight, bias)
    codes, scales, _ = _in_order(weight, weight.codes)
    return _packed(weight, INT8, as_tiles(codes), scales, None, bias)


def prepare_linear_int4(weight: PackedWeight, bias: Tensor | None) -> Packed | int4.PackedLinear:
    """Once per weight, bias [N] or None. The caller drops its own reference to the weight."""
    if (why := refusal(weight)) is not None:
        log.warning("an int4 weight [%d, %d] is multiplied by torch: %s", weight.outputs, weight.inputs, why)
        return int4.prepare_linear_int4(weight, bias)
    codes, scales, zeros = _in_order(weight, int4.unpack_int4(weight.codes, weight.group))
    return _packed(weight, INT4, as_words(codes), scales, zeros, bias)


def _in_order(weight: PackedWeight, codes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, K], scales and zeros [G, N] in the order of the inputs."""
    if weight.order is None:
        return codes, weight.scales, weight.zeros
    groups = _groups_in_order(weight.order, weight.group)
    zeros = None if weight.zeros is None else weight.zeros[groups]
    return codes[:, weight.order.argsort()], weight.scales[groups], zeros


def as_words(codes: Tensor) -> Tensor:
    """[N, K] in 0 .. 15 -> [N / 16, K / 32, 4, 32, 2] uint8, the bytes of the words of src/linear_args.h."""
    outputs, inputs = codes.shape
    whole = F.pad(codes, (0, 0, 0, -outputs % OUTPUTS))
    # By line, nibble and parity; then the low and the high byte of a word, of two nibbles each.
    nibbles = whole.view(whole.shape[0] // OUTPUTS, OUTPUTS, inputs // INPUTS, 4, 2, 2, 2)
    low, high = nibbles.permute(5, 0, 2, 3, 1, 6, 4)
    words = huge_empty((whole.shape[0] // OUTPUTS, inputs // INPUTS, 4, 2 * OUTPUTS, 2), torch.uint8)
    return words.copy_((low | high << 4).reshape(words.shape))


def _by_outputs(values: Tensor) -> Tensor:
    """[G, N] -> [N / 16, G, 16] fp32, padded with zeros."""
    whole = F.pad(values.float(), (0, -values.shape[1] % OUTPUTS)).view(values.shape[0], -1, OUTPUTS).transpose(0, 1)
    return huge_empty(tuple(whole.shape), whole.dtype).copy_(whole)


def _packed(
    weight: PackedWeight, kind: int, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Packed:
    return Packed(
        kind,
        codes,
        _by_outputs(scales),
        None if zeros is None else _by_outputs(zeros),
        weight.group,
        padded_bias(bias),
        weight.inputs,
        weight.outputs,
    )


@implements("linear_int8", "native", when=usable, prepare=prepare_linear_int8)
def linear_int8(x: Tensor, packed: Any) -> Tensor:
    """See the reference. A row's bits do not depend on the number of rows."""
    if isinstance(packed, Packed):
        return multiply(x, packed, x.dtype)
    return int8.linear_int8(x, packed)


@implements("linear_int4", "native", when=usable, prepare=prepare_linear_int4)
def linear_int4(x: Tensor, packed: Any) -> Tensor:
    """See the reference. A row's bits do not depend on the number of rows."""
    if isinstance(packed, Packed):
        return multiply(x, packed, x.dtype)
    return int4.linear_int4(x, packed)
