"""How often a Triton kernel reads and writes each byte of a tensor, counted from outside while it is interpreted.

    with traffic(k=cache.k, v=cache.v) as seen:
        kernels.attention.run(...)
    seen["k"].reads   # an integer per byte, [*cache.k.shape, bytes per entry]

Every load and store of the interpreter goes through its builder with the addresses and the mask, so that kernels need
no counters of their own. Atomics are not counted; the kernels have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder


@dataclass(frozen=True, slots=True)
class Traffic:
    """Times that each byte of a tensor was read and written: [*shape, bytes per entry]."""

    reads: np.ndarray
    writes: np.ndarray

    @property
    def bytes_read(self) -> int:
        return int(self.reads.sum())

    @property
    def bytes_written(self) -> int:
        return int(self.writes.sum())


@contextmanager
def traffic(**tensors: Tensor) -> Iterator[dict[str, Traffic]]:
    """Count what interpreted kernels do to contiguous CPU tensors. ValueError for a tensor that is not."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"{name} is not a contiguous tensor of the CPU")
    shapes = {name: (*tensor.shape, tensor.itemsize) for name, tensor in tensors.items()}
    seen = {name: Traffic(np.zeros(shape, np.int64), np.zeros(shape, np.int64)) for name, shape in shapes.items()}
    reads = {tensors[name].data_ptr(): counts.reads.reshape(-1) for name, counts in seen.items()}
    writes = {tensors[name].data_ptr(): counts.writes.reshape(-1) for name, counts in seen.items()}

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    try:
        # Interpreted code finds both by name on its builder; an unmasked load is a masked one with a full mask.
        InterpreterBuilder.create_masked_load = _counting(load, reads, mask_at=1)
        InterpreterBuilder.create_masked_store = _counting(store, writes, mask_at=2)
        yield seen
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def _counting(call: Callable[..., Any], counters: dict[int, np.ndarray], mask_at: int) -> Callable[..., Any]:
    """The builder's method, which first counts the addresses that the mask lets through."""

    def counted(builder: Any, pointers: Any, *rest: Any) -> Any:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        mask = rest[mask_at - 1].data
        addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)].astype(np.int64)
        for base, counts in counters.items():
            offsets = addresses - base
            inside = offsets[(offsets >= 0) & (offsets < counts.size)]
            for byte in range(width):
                np.add.at(counts, inside + byte, 1)
        return call(builder, pointers, *rest)

    return counted
