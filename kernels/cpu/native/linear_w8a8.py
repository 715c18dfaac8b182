"""Products of activations and weights that are both in eight-bit codes; see src/integers.h."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...packed import PackedWeight, QuantizedRows
from ...reference import int8 as reference
from ...registry import implements
from .library import DTYPES, OUT_OF_MEMORY, Kernel, address, usable

log = logging.getLogger(__name__)

TILE, OUTPUTS, INPUTS = 16, 16, 64  # rows, outputs and inputs of a tile
CODES = 2  # the dtype of rows that are codes already
MOST_INPUTS = 1 << 17  # of which the sum of products, 127 * 128 each, is a 32-bit integer

_linear = Kernel("linear_w8a8", "iipipipppppiiipp")


class TiledIntegers(NamedTuple):
    weight: Tensor  # [outputs / 16, inputs / 64, 16, 16, 4] int8: quads of inputs by outputs; padded with zeros
    scales: Tensor  # [outputs, padded to 16] fp32
    sums: Tensor  # [outputs, padded to 16] int32: of an output's codes
    bias: Tensor | None  # [outputs, padded to 16] fp32
    input_scale: Tensor | None  # [] fp32
    inputs: int
    outputs: int


def prepare_linear_w8a8(weight: PackedWeight, bias: Tensor | None) -> TiledIntegers | reference.PackedLinear:
    """Once per weight, bias [N] or None. The caller drops its own reference to the weight."""
    outputs, inputs = weight.codes.shape
    if inputs > MOST_INPUTS:
        log.warning(
            "torch multiplies by a w8a8 weight of %d inputs: sums of more than %d overflow", inputs, MOST_INPUTS
        )
        return reference.PackedLinear(weight, bias)

    def padded(values: Tensor) -> Tensor:
        return F.pad(values.float(), (0, -outputs % OUTPUTS))

    codes = F.pad(weight.codes, (0, -inputs % INPUTS, 0, -outputs % OUTPUTS))
    tiles = codes.view(codes.shape[0] // OUTPUTS, OUTPUTS, codes.shape[1] // INPUTS, INPUTS // 4, 4)
    return TiledIntegers(
        tiles.permute(0, 2, 3, 1, 4).contiguous(),
        padded(weight.scales.flatten()),
        codes.sum(-1, dtype=torch.int32),
        None if bias is None else padded(bias),
        None if weight.input_scale is None else weight.input_scale.float(),
        inputs,
        outputs,
    )


@implements("linear_w8a8", "native", when=usable, prepare=prepare_linear_w8a8)
def linear_w8a8(x: Tensor | QuantizedRows, packed: Any) -> Tensor:
    """See the reference, whose bits these are. All of a row that holds a NaN is NaN, if it comes plain.

    MemoryError where the threads get no working memory.
    """
    if isinstance(packed, reference.PackedLinear):
        return reference.linear_w8a8(x, packed)
    weight, scales, sums, bias, input_scale, inputs, outputs = packed
    if isinstance(x, QuantizedRows):
        rows, kind, dtype, row_scales, scale_row = x.codes, CODES, x.dtype, x.scales, x.scales.stride(0)
    else:
        rows, kind, dtype, row_scales, scale_row = x, DTYPES[x.dtype], x.dtype, None, 0
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    count = rows.shape[0]
    out = torch.empty(count, outputs, dtype=dtype)
    padded_rows, padded_inputs = count + -count % TILE, inputs + -inputs % INPUTS
    workspace = torch.empty(padded_rows * (padded_inputs + 4), dtype=torch.int8)
    status = _linear(
        count,
        kind,
        rows.data_ptr(),
        rows.stride(0),
        address(row_scales),
        scale_row,
        address(input_scale),
        weight.data_ptr(),
        scales.data_ptr(),
        sums.data_ptr(),
        address(bias),
        inputs,
        outputs,
        DTYPES[dtype],
        out.data_ptr(),
        workspace.data_ptr(),
    )
    if status == OUT_OF_MEMORY:
        raise MemoryError("linear_w8a8: no memory for the working buffers")
    return out
