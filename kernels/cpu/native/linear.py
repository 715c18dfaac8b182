"""Matrix products on bf16 weights that were laid out once as the matrix unit's tiles; see src/linear.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...registry import Target, implements
from .library import Kernel, address, levels, usable

ROWS, OUTPUTS, INPUTS = 16, 16, 32  # of a tile

_linear = Kernel("linear", "ipppiip")


class TiledLinear(NamedTuple):
    weight: Tensor  # [outputs / 16, inputs / 32, 16, 16, 2]: pairs of inputs by outputs; padded with zeros
    bias: Tensor | None  # [outputs, padded to 16] fp32
    inputs: int
    outputs: int


def prepare_linear(weight: Tensor, bias: Tensor | None) -> TiledLinear:
    """Once per weight: weight [N, K], bias [N] or None. The caller drops its own reference to the weight."""
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, -inputs % INPUTS, 0, -outputs % OUTPUTS))
    tiles = padded.view(padded.shape[0] // OUTPUTS, OUTPUTS, padded.shape[1] // INPUTS, INPUTS // 2, 2)
    if bias is not None:
        bias = F.pad(bias.float(), (0, -outputs % OUTPUTS))
    return TiledLinear(tiles.permute(0, 2, 3, 1, 4).contiguous(), bias, inputs, outputs)


def has_tiles(target: Target) -> str | None:
    if target.dtype != torch.bfloat16:
        return f"computes in bfloat16, the target in {str(target.dtype).removeprefix('torch.')}"
    return usable(target) or (None if levels()[0] == "amx" else "this processor has no matrix tiles (AMX)")


@implements("linear", "native", when=has_tiles, prepare=prepare_linear)
def linear(x: Tensor, packed: Any) -> Tensor:
    """See the reference. A row's bits do not depend on the number of rows."""
    weight, bias, inputs, outputs = packed
    rows = x.shape[0]
    padding = -rows % ROWS if rows > ROWS else 0
    if padding or inputs % INPUTS:
        x = F.pad(x, (0, -inputs % INPUTS, 0, padding))
    else:
        x = x.contiguous()
    out = torch.empty(rows + padding, outputs, dtype=torch.bfloat16)
    _linear(
        rows + padding,
        x.data_ptr(),
        weight.data_ptr(),
        address(bias),
        x.shape[1],
        outputs,
        out.data_ptr(),
    )
    return out[:rows] if padding else out
