"""What all timings share: the implementations that the engine would take, and rows that name limit and target."""

from __future__ import annotations

import torch

from ..engine.config import EngineConfig
from ..kernels import Kernels, Target, resolve
from .gpu_clock import DEVICE, Ceilings, Timing, capability
from .gpu_rows import Row

BF16 = torch.bfloat16
HEAD_DIM = 128
BLOCK_SIZE = EngineConfig().block_size  # tokens of a page


def resolved(kv: str = "bf16", overrides: dict[str, str] | None = None) -> Kernels:
    """The table of a bf16 model with heads of 128 on this card."""
    return resolve(Target(DEVICE, BF16, HEAD_DIM, kv, capability()), overrides)


def remarks(kernels: Kernels, op: str, timing: Timing, *more: str) -> str:
    """What a reader must know of a figure: not by Triton, not captured, and `more`."""
    name = kernels.describe()[op]
    notes = list(more)
    if name != "triton":
        notes.append(f"by {name}: {kernels.reasons().get(op, {}).get('triton', 'no Triton kernel')}")
    if not timing.captured:
        notes.append("launched from Python, not captured")
    return "; ".join(notes)


def aim(row: Row, target: str, met: bool) -> Row:
    """State a target; an ok row that misses it is "below"."""
    row.target = target
    if row.status == "ok" and not met:
        row.status = "below"
    return row


def bandwidth_row(section: str, name: str, timing: Timing, nbytes: int, ceilings: Ceilings) -> Row:
    """Work that is limited by the bytes it must move."""
    rate = nbytes / timing.seconds
    return Row(section, name, seconds=timing.seconds, figure=rate / 1e9, unit="GB/s", share=rate / ceilings.copy)


def roofline_row(
    section: str, name: str, timing: Timing, nbytes: float, operations: float, peak: float, ceilings: Ceilings
) -> Row:
    """Work that is limited by its bytes or its operations, whichever take longer at the measured limits."""
    if nbytes / ceilings.copy > operations / peak:
        figure, unit = nbytes / timing.seconds / 1e9, "GB/s"
    else:
        figure, unit = operations / timing.seconds / 1e12, "TFLOP/s"
    share = max(nbytes / ceilings.copy, operations / peak) / timing.seconds
    return Row(section, name, seconds=timing.seconds, figure=figure, unit=unit, share=share)
