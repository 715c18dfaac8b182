"""Matrix products on weights that were laid out once, in bf16 as the matrix unit's tiles; see src/linear_args.h.

weight ──pack──▶ Packed ──▶ multiply(x, packed, out dtype)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...registry import Target, implements
from .library import DTYPES, Kernel, address, levels, usable
from .pages import huge_empty

OUTPUTS, INPUTS = 16, 32  # of a tile
FLOATS, INT8, INT4 = 0, 1, 2  # WeightKind of src/linear_args.h

_linear = Kernel("linear", "iiipiipppipiipp")


class Packed(NamedTuple):
    """A weight [outputs, inputs] as src/linear_args.h lays it out."""

    kind: int
    weight: Tensor
    scales: Tensor | None  # [outputs / 16, groups, 16] fp32
    zeros: Tensor | None  # likewise; None = 8, as of symmetric codes
    group: int
    bias: Tensor | None  # [outputs, padded to 16] fp32
    inputs: int
    outputs: int


def prepare_linear(weight: Tensor, bias: Tensor | None) -> Packed:
    """Once per weight: weight [N, K], bias [N] or None. The caller drops its own reference to the weight."""
    outputs, inputs = weight.shape
    laid = as_tiles(weight) if weight.dtype == torch.bfloat16 else as_vectors(weight)
    return Packed(FLOATS, laid, None, None, inputs, padded_bias(bias), inputs, outputs)


def as_tiles(weight: Tensor) -> Tensor:
    """[N, K] -> [N / 16, K / 32, 16, 16, 2]: pairs of inputs by outputs; padded with zeros."""
    outputs, inputs = weight.shape
    tiles = huge_empty((-(-outputs // OUTPUTS), -(-inputs // INPUTS), INPUTS // 2, OUTPUTS, 2), weight.dtype)
    whole = F.pad(weight, (0, -inputs % INPUTS, 0, -outputs % OUTPUTS))
    return tiles.copy_(whole.view(tiles.shape[0], OUTPUTS, tiles.shape[1], INPUTS // 2, 2).permute(0, 2, 3, 1, 4))


def as_vectors(weight: Tensor) -> Tensor:
    """[N, K] -> [N / 16, K, 16]; padded with zeros."""
    outputs, inputs = weight.shape
    vectors = huge_empty((-(-outputs // OUTPUTS), inputs, OUTPUTS), weight.dtype)
    return vectors.copy_(F.pad(weight, (0, 0, 0, -outputs % OUTPUTS)).view(-1, OUTPUTS, inputs).transpose(1, 2))


def padded_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else F.pad(bias.float(), (0, -bias.shape[0] % OUTPUTS))


def has_tiles(target: Target) -> str | None:
    """The predicate of products by tiles."""
    if target.dtype != torch.bfloat16:
        return f"computes in bfloat16, the target in {str(target.dtype).removeprefix('torch.')}"
    return usable(target) or (None if levels()[0] == "amx" else "this processor has no matrix tiles (AMX)")


def multiply(x: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """x · weightᵀ + bias: x [T, K] -> [T, N] in dtype. A row's bits do not depend on the number of rows."""
    kind, weight, scales, zeros, group, bias, inputs, outputs = packed
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = x.shape[0]
    out = torch.empty((rows, outputs), dtype=dtype)
    status = _linear(
        rows,
        DTYPES[x.dtype],
        DTYPES[dtype],
        x.data_ptr(),
        x.stride(0),
        kind,
        weight.data_ptr(),
        address(scales),
        address(zeros),
        group,
        address(bias),
        inputs,
        outputs,
        out.data_ptr(),
        0,  # rows of x in their order
    )
    if status:
        raise MemoryError("linear: no memory for the working buffers")
    return out


@implements("linear", "native", when=usable, prepare=prepare_linear)
def linear(x: Tensor, packed: Any) -> Tensor:
    """See the reference. A row's bits do not depend on the number of rows."""
    return multiply(x, packed, x.dtype)


@implements("logits", "native", when=usable, prepare=prepare_linear)
def logits(x: Tensor, packed: Any) -> Tensor:
    """See the reference; the sums are not rounded. A row's bits do not depend on the number of rows."""
    return multiply(x, packed, torch.float32)
