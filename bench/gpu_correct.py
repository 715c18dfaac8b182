"""Every registered implementation of a kind against its op's reference, which runs on the CPU on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import Implementation, Target, implementations, ops
from ..kernels.packed import QuantizedRows
from ..kernels.reference.rows import dequantize_rows
from .gpu_inputs import PREPARED, Case, Inputs, Sizes, all_cases, moved
from .gpu_isolation import is_fatal
from .gpu_rows import ERROR, Item, Row

SECTION = "correct"
AT_ONCE = 4  # cases that a fault takes with it; each may compile several kernels, seconds apiece
# Of the whole result (relative Frobenius error) and of its worst entry (to the largest one). fp32: products in TF32,
# whose mantissa has 10 bits; bf16 has 7, fp16 10, and results are rounded once or twice.
COARSE = (4e-2, 1.5e-1)  # a few neighbouring codes of int4 or e4m3
LIMITS = {torch.float32: (2e-3, 1e-2), torch.float16: (5e-3, 2e-2), torch.bfloat16: (1.5e-2, 4e-2)}


def items(device: str, sizes: Sizes, name: str, capability: tuple[int, int]) -> list[Item]:
    """A few cases each, of every op that has an implementation of that name."""
    by_op: dict[str, list[Case]] = {op: [] for op in ops() if name in implementations(op)}
    for case in all_cases(sizes):
        if case.op in by_op:
            by_op[case.op].append(case)
    return [
        Item(f"{op} {first + 1}", partial(_check_some, op, cases[first : first + AT_ONCE], device, name, capability))
        for op, cases in by_op.items()
        for first in range(0, max(1, len(cases)), AT_ONCE)
    ]


def _check_some(op: str, cases: list[Case], device: str, name: str, capability: tuple[int, int]) -> list[Row]:
    if not cases:
        return [Row(SECTION, op, "failed", note="no inputs are known for this op: add them to gpu_inputs.py")]
    candidate, reference = implementations(op)[name], implementations(op)["reference"]
    rows = []
    for case in cases:
        try:
            rows.append(_check(case, candidate, reference, device, capability))
        except Exception as error:
            text = f"{case.op} {case.label}: {type(error).__name__}: {error}"
            if is_fatal(text):
                raise RuntimeError(text) from error
            rows.append(Row(SECTION, f"{case.op} {case.label}", "failed", note=" ".join(text.split())[:300]))
    return rows


def _check(
    case: Case, candidate: Implementation, reference: Implementation, device: str, capability: tuple[int, int]
) -> Row:
    row = Row(SECTION, f"{case.op} {case.label}")
    if why := candidate.when(Target(device, case.dtype, case.head_dim, case.kv_format, capability)):
        row.status, row.note = "skipped", why
        return row
    inputs = case.make()
    expected = call(reference, moved(inputs.run, "cpu"), moved(inputs.prepare, "cpu"), inputs)
    actual = call(candidate, moved(inputs.run, device), moved(inputs.prepare, device), inputs)
    difference, worst, mismatched = compare(actual, expected)
    row.figure, row.unit = difference, ERROR
    limit, worst_limit = COARSE if case.coarse else LIMITS[case.dtype]
    if not (difference <= limit and worst <= worst_limit and mismatched <= case.mismatches):
        row.status = "wrong"
        row.note = f"worst entry {worst:.2g} of the largest, {mismatched:.2%} of integers and infinities differ"
    return row


def call(implementation: Implementation, run: tuple[Any, ...], prepare: tuple[Any, ...] | None, inputs: Inputs) -> Any:
    """Prepare and run; the outcome that is compared."""
    if prepare is not None:
        prepared = implementation.prepare(*prepare)
        run = tuple(prepared if argument is PREPARED else argument for argument in run)
    return inputs.outcome(run, implementation.run(*run))


def flat(value: Any) -> Iterator[Tensor]:
    """The tensors of a result, on the CPU; quantized rows as what they stand for."""
    if isinstance(value, Tensor):
        yield value.detach().cpu()
    elif isinstance(value, QuantizedRows):
        yield dequantize_rows(QuantizedRows(value.codes.cpu(), value.scales.cpu(), value.dtype))
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from flat(entry)


def compare(actual: Any, expected: Any) -> tuple[float, float, float]:
    """(relative Frobenius error, worst entry's error over the largest entry, share of integers and infinities that
    differ), each the largest over the tensors of the result. NaN where only one has NaN counts as an infinite error."""
    errors = [(0.0, 0.0, 0.0)]
    ours, theirs = list(flat(actual)), list(flat(expected))
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ValueError(f"shapes {[tuple(t.shape) for t in ours]}, expected {[tuple(t.shape) for t in theirs]}")
    for a, b in zip(ours, theirs, strict=True):
        if a.numel() == 0:
            continue
        if not b.dtype.is_floating_point:
            errors.append((0.0, 0.0, (a != b).double().mean().item()))
            continue
        a, b = a.double(), b.double()
        if (a.isnan() != b.isnan()).any():
            errors.append((float("inf"), float("inf"), 0.0))
            continue
        special = a.isinf() | b.isinf()
        mismatched = ((a != b) & special).double().mean().item()
        a, b = (torch.where(special | t.isnan(), 0.0, t) for t in (a, b))
        tiny = torch.finfo(torch.float32).tiny
        worst = ((a - b).abs().max() / b.abs().max().clamp_min(tiny)).item()
        errors.append((((a - b).norm() / b.norm().clamp_min(tiny)).item(), worst, mismatched))
    return tuple(max(column) for column in zip(*errors, strict=True))  # type: ignore[return-value]
