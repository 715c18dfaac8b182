"""The limits of this very card, by torch's own kernels: what a copy moves, what products of large squares reach."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from .gpu_clock import DEVICE, capability, time_calls
from .gpu_rows import Item, Row

SECTION = "ceilings"
COPIED = 1 << 30  # bytes: many times any L2 cache
SIZE = 8192  # of the squares: 1.1e12 operations, about 2 ms


def items() -> Iterator[Item]:
    yield Item("copy", _copy)
    for kind in ("bf16", "fp8", "int8"):
        yield Item(kind, partial(_product, kind))


def _copy() -> list[Row]:
    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = time_calls([lambda: target.copy_(source)]).seconds
    return [
        Row(SECTION, "copy", seconds=seconds, figure=2 * COPIED / seconds / 1e9, unit="GB/s", note="read and written")
    ]


def _product(kind: str) -> list[Row]:
    if kind == "fp8" and capability() < (8, 9):
        return [Row(SECTION, kind, "skipped", note="the card has no fp8 products")]
    a, b = (torch.randn(SIZE, SIZE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    if kind == "bf16":
        product = lambda: a @ b.T  # noqa: E731
    elif kind == "fp8":
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)
        product = lambda: torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    else:
        ai, bi = ((30 * x).to(torch.int8) for x in (a, b))
        product = lambda: torch._int_mm(ai, bi.T)  # noqa: E731
    seconds = time_calls([product]).seconds
    return [
        Row(SECTION, kind, seconds=seconds, figure=2 * SIZE**3 / seconds / 1e12, unit="TFLOP/s", note=f"{SIZE} cubed")
    ]
