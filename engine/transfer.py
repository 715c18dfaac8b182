"""Between the host and the device, without the host waiting for what the device is at.

    upload(arrays) ──one copy──▶ tensors on the device        Download(tensors) ──begun at once──▶ wait() ──▶ host

A plain `.to(device)` or `.tolist()` waits for everything that was launched before it, the step that is out included.
From and into pinned memory a copy is only queued; torch gives pinned memory out again when its copies are done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: a multiple of every item's size, and what vector loads want


Field = tuple[tuple[int, ...], torch.dtype]  # the shape and type of a tensor in a buffer


def buffer_size(fields: Sequence[Field]) -> int:
    """Bytes that `views` needs."""
    return _starts(fields)[-1]


def views(buffer: Tensor, fields: Sequence[Field]) -> list[Tensor]:
    """A byte buffer as tensors, laid end to end and aligned."""
    return [
        buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for start, (shape, dtype) in zip(_starts(fields), fields, strict=False)
    ]


def _starts(fields: Sequence[Field]) -> list[int]:
    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in fields)
    return list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))


def staging(size: int, device: torch.device) -> Tensor:
    """Zeroed bytes on the host, from which a copy to the device is only queued."""
    return torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, in the order of the stream. On the CPU they are not copied."""
    tensors = [torch.from_numpy(array) for array in arrays]
    return tensors if device.type == "cpu" else send(tensors, device)


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host to the device, in one copy."""
    fields = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    stage = staging(buffer_size(fields), device)
    for view, tensor in zip(views(stage, fields), tensors, strict=True):
        view.copy_(tensor)
    return views(stage.to(device, non_blocking=True), fields)


class Download:
    """Tensors on their way to the host; what is launched after its making is not waited for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = list(tensors)
        if any(tensor.is_cuda for tensor in tensors):
            self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._host
