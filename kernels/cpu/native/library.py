"""The compiled kernels: where the library is, and how they are called.

    kernel(rows, ...) ──▶ 8-byte slots ──▶ run at once, by the library's own threads
                                └────────▶ or, while a tape records, written down (tape.py)

A kernel's arguments are integers, floats and addresses, in the order of its struct in src/. It runs on as many threads
as torch would (torch.set_num_threads), unless it is told otherwise (set_num_threads).
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import threading
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from ...kv_formats import kv_format
from ...registry import Target

log = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # the codes of src/kernels.h
FORMATS = {"fp32": 0, "bf16": 1, "fp16": 2, "fp8_e4m3": 3, "int8_per_token_head": 4, "int4_per_token_head": 5}
OUT_OF_RANGE, OUT_OF_MEMORY = 1, 2  # what kernels return where they fail, 0 otherwise


def _find() -> Path | None:
    """The library of the install, or the file that QUIRE_NATIVE_LIBRARY names: one that was built with a sanitizer."""
    if (named := os.environ.get("QUIRE_NATIVE_LIBRARY")) is not None:
        return Path(named)
    here = Path(__file__).parent
    return next((path for suffix in EXTENSION_SUFFIXES if (path := here / f"_kernels{suffix}").exists()), None)


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    path = _find()
    if path is None:
        return None, "the C++ library is not built: install a C++17 compiler, then install quire again"
    try:
        library = ctypes.CDLL(str(path))
        library.quire_level.argtypes, library.quire_level.restype = [ctypes.c_int64], ctypes.c_char_p
        library.quire_kernel.argtypes, library.quire_kernel.restype = [ctypes.c_int64], ctypes.c_char_p
        library.quire_slots.argtypes, library.quire_slots.restype = [ctypes.c_int64], ctypes.c_int64
        library.quire_use_level.argtypes, library.quire_use_level.restype = [ctypes.c_int64], None
        library.quire_call.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64]
        library.quire_call.restype = ctypes.c_int64
        library.quire_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
        library.quire_run.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        return None, f"the C++ library cannot be loaded ({error}): install quire again"
    return library, None


_library, problem = _load()
if problem is not None:
    log.warning("torch's own operators serve on the CPU: %s", problem)


def _kernels() -> dict[str, tuple[int, int]]:
    """Of each kernel in the library: its number, and how many slots it takes."""
    found: dict[str, tuple[int, int]] = {}
    while _library is not None and (name := _library.quire_kernel(len(found))) is not None:
        found[name.decode()] = len(found), _library.quire_slots(len(found))
    return found


_KERNELS = _kernels()


class _Recording(threading.local):
    """While this thread records a tape: what takes its calls' place, (kernel, its slots) -> status."""

    note: Callable[[int, bytes], int] | None = None


recording = _Recording()

_num_threads = 0


def set_num_threads(count: int) -> None:
    """Run kernels on so many threads from now on; 0 = on as many as torch uses."""
    global _num_threads
    _num_threads = count


def num_threads() -> int:
    """Of kernels from now on."""
    return _num_threads or torch.get_num_threads()


class Kernel:
    """A kernel of the library: called with the fields of its struct, the rows first, it runs and returns a status."""

    __slots__ = ("_pack", "name", "number")

    def __init__(self, name: str, fields: str) -> None:
        """fields: of its struct, one letter each: i integer, f float, p address. The first are the rows, an i.

        RuntimeError if the library has another number of them: it was built from other sources.
        """
        self.name = name
        self._pack = struct.Struct("=" + fields.translate({ord("i"): "q", ord("p"): "Q", ord("f"): "d"})).pack
        self.number, slots = _KERNELS.get(name, (-1, len(fields)))
        if slots != len(fields) or (_library is not None and self.number < 0):
            raise RuntimeError(f"the C++ library was built from other sources (kernel {name}): install quire again")

    def __call__(self, *values: float, threads: int | None = None) -> int:
        """threads: as many as `num_threads` says, or 1 for work that is done before another thread has woken up."""
        slots = self._pack(*values)
        if recording.note is not None:
            return recording.note(self.number, slots)
        if _library is None:
            raise RuntimeError(str(problem))
        return _library.quire_call(self.number, slots, threads or num_threads())


def run(calls: int, count: int, rows: int) -> int:
    """`count` calls, by the address of the first of src/pool.h's structures, with so many rows. Returns a status."""
    if _library is None:
        raise RuntimeError(str(problem))
    return _library.quire_run(calls, count, num_threads(), rows)


def address(tensor: Tensor | None) -> int:
    """Of its first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def levels() -> list[str]:
    """The instruction sets this processor can run the kernels with, the best, which is used, first."""
    names: list[str] = []
    while _library is not None and (name := _library.quire_level(len(names))) is not None:
        names.append(name.decode())
    return names


def use_level(index: int) -> None:
    """Compute with levels()[index] from now on, in all threads: for tests."""
    if _library is None or not 0 <= index < len(levels()):
        raise ValueError(f"level {index} is not among {levels()}")
    _library.quire_use_level(index)


def usable(target: Target) -> str | None:
    """The predicate of every op here: None, or why this library cannot serve the target."""
    if target.device != "cpu":
        return f"runs on cpu, the target is {target.device}"
    if target.dtype not in DTYPES:
        return f"computes in bfloat16 and float32, the target in {str(target.dtype).removeprefix('torch.')}"
    return problem


def usable_on_cache(target: Target) -> str | None:
    """The same for ops that touch keys and values."""
    if target.kv_format not in FORMATS:
        return f"reads and writes keys and values in {', '.join(FORMATS)}; the cache holds {target.kv_format}"
    if target.head_dim % 16:
        return f"needs a head size that is a multiple of 16, the target's is {target.head_dim}"
    return kv_format(target.kv_format).refuses(target.head_dim) or usable(target)
