"""Work written down once and repeated by C++ in one call: what a CUDA graph is to a GPU.

    record(function, rows) ─▶ function runs; its kernel calls are noted, not made ─▶ Tape
    tape.replay(n) ─▶ the same calls on the same memory, with n rows instead of `rows`

A step of a small model, or of one sequence, would else spend more time in Python than in kernels. What a function does
besides kernel calls happens once, when it is recorded: so it may take views and empty memory, and nothing else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import library
from .library import OUT_OF_MEMORY, OUT_OF_RANGE
from .pages import huge_empty

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}


class _Call(ctypes.Structure):
    """`Call` of src/pool.h."""

    _fields_ = (("kernel", ctypes.c_int64), ("slots", ctypes.c_void_p))


class Unrecordable(Exception):
    """The function does something that a replay would not repeat."""


class Tape:
    """Calls of kernels, and the memory that they work on."""

    def __init__(self, calls: list[tuple[int, bytes]], memory: list[Tensor], result: Tensor, rows: int) -> None:
        self.rows = rows  # the most that a replay may have
        self.result = result  # with all rows
        self.memory = memory  # what the kernels write to
        self._slots = ctypes.create_string_buffer(b"".join(slots for _, slots in calls))
        self._calls = (_Call * len(calls))()
        start = ctypes.addressof(self._slots)
        for call, (kernel, slots) in zip(self._calls, calls, strict=True):
            call.kernel, call.slots = kernel, start
            start += len(slots)
        self._first = ctypes.addressof(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def replay(self, rows: int) -> Tensor:
        """The result's first rows, valid until the next replay.

        IndexError where a position, slot, block or token id is out of range; MemoryError without working memory.
        """
        status = library.run(self._first, len(self._calls), rows)
        if status == OUT_OF_RANGE:
            raise IndexError("a position, slot, block, row or token id of the step is out of range")
        if status == OUT_OF_MEMORY:
            raise MemoryError("no memory for a kernel's working buffers")
        return self.result[:rows]


def record(function: Callable[[], Tensor], rows: int) -> Tape:
    """What `function` does for `rows` rows, which all its kernel calls have. Unrecordable says why not."""
    if library.recording.note is not None:
        raise Unrecordable("a tape is being recorded already")
    calls: list[tuple[int, bytes]] = []

    def note(kernel: int, slots: bytes) -> int:
        count = int.from_bytes(slots[:8], "little", signed=True)
        if count != rows:
            raise Unrecordable(f"a kernel works on {count} rows where there are {rows}")
        calls.append((kernel, slots))
        return 0

    memory = _Memory()
    library.recording.note = note
    try:
        with memory:
            result = function()
    finally:
        library.recording.note = None
    return Tape(calls, memory.blocks, result, rows)


class _Memory(TorchDispatchMode):
    """Gives out memory that outlives the recording. What a function lets go of, its later calls get again: a replay
    keeps their order."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What torch asks of a mode: for a yes it imports its compiler, a second of every start."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not op.is_view and op not in _EMPTY:
            raise Unrecordable(f"{op} is no kernel of the library")
        like = op(*args, **(kwargs or {}))
        if op.is_view:  # `contiguous` and `to` are by this sign, and copy where they must
            views = [like] if isinstance(like, Tensor) else like
            if any(_storage(view) != _storage(args[0]) for view in views):
                raise Unrecordable(f"{op} is no kernel of the library: it copies")
            return like
        if not like.is_contiguous():
            raise Unrecordable(f"{op} gives memory that does not lie together")
        return self._take(like.nbytes).view(like.dtype).view(like.shape)

    def _take(self, size: int) -> Tensor:
        for block in self.blocks:
            storage = block.untyped_storage()
            if block.nbytes == size and torch._C._storage_Use_Count(storage._cdata) <= _ONE_OWNER:
                return block
        self.blocks.append(huge_empty((size,), torch.uint8))
        return self.blocks[-1]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _owners_of_an_unused_block() -> int:
    block = torch.empty(64, dtype=torch.uint8)
    storage = block.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


_ONE_OWNER = _owners_of_an_unused_block()
