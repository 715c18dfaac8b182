"""Matrix products by oneDNN on weights that it has laid out once for its own tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Target, implements

# oneDNN compiles a kernel for every number of rows it meets: about 3.5 ms per shape of weight at 100 to 133 rows, twice
# the product itself (five shapes of a 0.5B model: 24 to 31 ms the first time, 7 to 13 later). Above this many rows they
# are padded to a multiple of it, so that few numbers ever occur.
ROW_MULTIPLE = 16


class PackedLinear(NamedTuple):
    weight: Tensor  # opaque, [N, K] in oneDNN's layout
    bias: Tensor | None  # [N]


def prepare_linear(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Once per weight: weight [N, K], bias [N] or None. The caller drops its own reference to the weight."""
    return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias)


def usable(target: Target) -> str | None:
    if target.device != "cpu":
        return f"runs on cpu, the target is {target.device}"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if target.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bf16 arithmetic"
    if target.dtype not in (torch.bfloat16, torch.float32):
        return f"computes in bfloat16 and float32, the target in {str(target.dtype).removeprefix('torch.')}"
    return None


@implements("linear", "cpu", when=usable, prepare=prepare_linear)
def linear(x: Tensor, packed: Any) -> Tensor:
    """See the reference. 1.5 to 1.7 times as fast as torch's own at 1 to 64 rows in bf16, 1.1 to 1.4 at 128 to 1024.

    In fp32 a row's bits do not depend on the number of rows: a single one is computed as two, because oneDNN sums it
    in another order. In bf16 they may differ in the last place.
    """
    rows = x.shape[0]
    if rows == 1 and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x.repeat(2, 1), packed.weight, packed.bias, "none", [], "")[:1]
    if rows > ROW_MULTIPLE and rows % ROW_MULTIPLE:
        x = F.pad(x, (0, 0, 0, -rows % ROW_MULTIPLE))
        return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")[:rows]
    return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")


@implements("logits", "cpu", when=usable, prepare=prepare_linear)
def logits(x: Tensor, packed: Any) -> Tensor:
    """See the reference; but oneDNN rounds its sums to x's dtype, which in bf16 leaves 8 bits of a logit."""
    return linear(x, packed).float()
