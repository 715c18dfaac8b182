"""Runs every compiled kernel on tensors that end, or begin, where the process has no memory. A script: it may die.

    python guarded.py end|begin|trespass-end|trespass-begin

Every tensor that is made while it runs, inputs, weights, caches and results alike, lies against a page that may be
neither read nor written. A kernel that goes beyond is killed there (SIGSEGV), and the last line printed names it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from quire.bench import kernel_work
from quire.bench.gpu_inputs import PREPARED, Case, Sizes, all_cases
from quire.bench.kernel_work import KV_OPS, WORK, Shape, Subject, formats
from quire.kernels import Implementation, Target, implementations, ops
from quire.kernels.cpu.native import library

PAGE = mmap.PAGESIZE
ROWS = (1, 3, 16, 17, 33, 65)
SHAPES = (
    Shape(hidden=96, ffn=160, heads=6, kv_heads=2, head_dim=64, vocab=200, experts=4, top_k=2, expert_ffn=64),
    # What no tile divides; whoever cannot have such shapes is left out.
    Shape(hidden=70, ffn=45, heads=3, kv_heads=1, head_dim=48, vocab=83, experts=3, top_k=2, expert_ffn=35),
)
WHOLE_BLOCKS = ("int4", "hadamard")  # formats and ops of powers of two

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
NO_ACCESS = 0  # PROT_NONE


def fenced(tensor: Tensor, side: str) -> Tensor:
    """A copy with the same sizes and strides between two forbidden pages: up to the last one, or from the first on."""
    if tensor.numel() == 0:
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = extent * tensor.element_size()
    inner = -(-nbytes // PAGE) * PAGE
    pages = mmap.mmap(-1, inner + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for fence in (start, start + PAGE + inner):
        if libc.mprotect(fence, PAGE, NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (inner - nbytes if side == "end" else 0)
    flat = torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=offset).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


class Fences(TorchDispatchMode):
    """Whatever torch's operators allocate is fenced; views of what there is stay as they are."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))

        def place(x: Any) -> Any:
            fresh = isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known
            return fenced(x, self.side) if fresh else x

        return tree_map(place, result)


Made = Iterator[tuple[str, Callable[[], Any]]]


def native_work() -> Made:
    """What the benchmark measures, in small ragged shapes."""
    for op in sorted(WORK.keys() & set(ops())):
        kernel = implementations(op).get("native")
        for shape in SHAPES:
            for format in formats(op):
                if shape.hidden % 32 and (format in WHOLE_BLOCKS or op in WHOLE_BLOCKS):
                    continue
                if usable(kernel, torch.bfloat16, shape.head_dim, format if op in KV_OPS else "bf16"):
                    at = WORK[op](Subject(kernel, format, shape))  # type: ignore[arg-type]
                    for rows in ROWS:
                        yield f"{op} {format} hidden={shape.hidden} rows={rows}", at(rows).calls[0]


def native_cases() -> Made:
    """What a GPU's kernels are checked with: trees, windows, mixed batches, every filter and edit, both dtypes."""
    for case in all_cases(Sizes(tiny=True)):
        kernel = implementations(case.op).get("native")
        if usable(kernel, case.dtype, case.head_dim, case.kv_format):
            yield f"{case.op} {case.label}", prepared(case, kernel)  # type: ignore[arg-type]


def prepared(case: Case, kernel: Implementation) -> Callable[[], Any]:
    inputs = case.make()
    made = None if inputs.prepare is None else kernel.prepare(*inputs.prepare)
    return partial(kernel.run, *(made if argument is PREPARED else argument for argument in inputs.run))


def usable(kernel: Implementation | None, dtype: torch.dtype, head_dim: int, kv_format: str) -> bool:
    return kernel is not None and kernel.when(Target("cpu", dtype, head_dim, kv_format)) is None


def trespass(side: str) -> None:
    """Reads one byte beyond: what a fence is for."""
    x = torch.ones(100)
    ctypes.string_at(x.data_ptr() + x.nbytes if side == "end" else x.data_ptr() - 1, 1)


def main() -> None:
    side = sys.argv[1].removeprefix("trespass-")
    faulthandler.enable()
    torch.set_num_threads(2)
    # One copy of each weight, contexts of some tiles, both decodes and chunks.
    kernel_work.BEYOND_CACHE, kernel_work.CONTEXT, kernel_work.MOST_DECODES = 0, 150, 5
    with Fences(side):
        if sys.argv[1] != side:
            trespass(side)
            return
        for label, run in itertools.chain(native_work(), native_cases()):
            for index, level in enumerate(library.levels()):
                library.use_level(index)
                print(f"{level} {label}", flush=True)
                run()


if __name__ == "__main__":
    main()
