"""Integer codes as weights: what GPTQ, AWQ and compressed-tensors have in common once their words are unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.packed import PackedWeight
from ...kernels.reference.int4 import pack_int4
from .scheme import check_scales

FORMATS = {4: "int4", 8: "int8"}


def integer_weight(
    bits: int, codes: Tensor, group: int, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None
) -> PackedWeight:
    """w[n, k] = (codes[n, k] - zeros[g, n]) · scales[g, n], where g is the group of input k.

    bits    4 or 8
    codes   [N, K] uint8
    group   inputs per scale, K for one per output
    scales  [G, N]
    zeros   [G, N] uint8, None = half the range everywhere
    g_idx   [K]: the group of each input where that is not k // group (GPTQ's act-order)
    """
    check_scales("scales", scales)
    outputs, inputs = codes.shape
    order = column_order(g_idx, inputs, group)
    if order is not None:
        codes = codes.index_select(1, order)
    if bits == 4:
        packed = pack_int4(codes, group)
    else:
        if zeros is not None and not bool((zeros == 128).all()):
            raise ValueError("zero points: eight-bit weights have none here; take a symmetric one, or four bits")
        packed, zeros = (codes ^ 128).contiguous().view(torch.int8), None  # q - 128 in two's complement
    return PackedWeight(
        format=FORMATS[bits],
        outputs=outputs,
        inputs=inputs,
        group=group,
        codes=packed,
        scales=scales.contiguous(),
        zeros=zeros,
        order=order,
    )


def column_order(g_idx: Tensor | None, inputs: int, group: int) -> Tensor | None:
    """The order of the inputs in which groups are contiguous: [K] int64, None = the one they have.

    ValueError for a group that does not exist, or has more inputs than the group size.
    """
    if g_idx is None:
        return None
    g_idx = g_idx.long()
    usual = torch.arange(inputs, device=g_idx.device) // group
    if torch.equal(g_idx, usual):
        return None
    last = int(usual[-1])
    low, high = (int(value) for value in g_idx.aminmax())
    if low < 0 or high > last:
        raise ValueError(f"g_idx: holds {low if low < 0 else high}, the groups are 0 to {last}; the file is damaged")
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order], usual):
        counts = g_idx.bincount(minlength=last + 1)
        wrong = int((counts != usual.bincount()).nonzero()[0])
        raise ValueError(f"g_idx: group {wrong} has {int(counts[wrong])} inputs, the group size is {group}")
    return order
