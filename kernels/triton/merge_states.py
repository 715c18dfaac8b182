"""Attention states over disjoint keys merged, two at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import implements
from .specialization import Specialization
from .support import on_gpu

_ROWS = 8  # (token, head) pairs of a program: 1,024 entries of heads of 128, 8 per thread


@triton.jit(do_not_specialize=("count",))
def _merge(o_a, lse_a, o_b, lse_b, out, lse, count, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < count
    a = tl.load(lse_a + row, mask=there, other=0.0)
    b = tl.load(lse_b + row, mask=there, other=0.0)
    largest = tl.maximum(a, b)
    # Where neither has seen a key, any number keeps the differences from NaN.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_a = tl.exp(a - base)
    weight_b = tl.exp(b - base)
    total = weight_a + weight_b
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    dims = tl.arange(0, COLUMNS)
    inside = there[:, None] & (dims < HEAD_DIM)[None, :]
    entry = row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    x = tl.load(o_a + entry, mask=inside, other=0.0).to(tl.float32) * (weight_a / total)[:, None]
    y = tl.load(o_b + entry, mask=inside, other=0.0).to(tl.float32) * (weight_b / total)[:, None]
    tl.store(out + entry, x + y, mask=inside)
    tl.store(lse + row, tl.where(empty, float("-inf"), base + tl.log(total)), mask=there)


@implements("merge_states", "triton", when=on_gpu)
def merge_states(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See the reference."""
    out, lse = outputs[0].contiguous(), lses[0].float().contiguous()
    for o_b, lse_b in zip(outputs[1:], lses[1:], strict=True):
        merged, merged_lse = torch.empty_like(out, dtype=torch.float32), torch.empty_like(lse)
        count, head_dim = lse.numel(), out.shape[-1]
        if count:
            _merge[(triton.cdiv(count, _ROWS),)](
                out,
                lse,
                o_b.contiguous(),
                lse_b.float().contiguous(),
                merged,
                merged_lse,
                count,
                head_dim,
                triton.next_power_of_2(head_dim),
                _ROWS,
                num_warps=4,
            )
        out, lse = merged, merged_lse
    return out.float(), lse


def specializations() -> list[Specialization]:
    """Merges of bf16 outputs."""
    outputs = {"o_a": "*bf16:16", "o_b": "*bf16:16", "out": "*fp32:16"}
    states = {"lse_a": "*fp32:16", "lse_b": "*fp32:16", "lse": "*fp32:16", "count": "i32"}
    return [
        Specialization(
            name="d128",
            kernel=_merge,
            signature=outputs | states,
            constexprs={"HEAD_DIM": 128, "COLUMNS": 128, "ROWS": _ROWS},
            needs=("wide",),
        )
    ]
