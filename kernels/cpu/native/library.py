"""The compiled kernels: where the library is, which threads it runs on, and what its functions take.

It is built with OpenMP but linked to no OpenMP runtime, and finds the one that torch has loaded. So both share one
pool of threads, sized by torch.set_num_threads; with a second one the pools would spin against each other.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from ...registry import Target

log = logging.getLogger(__name__)

INTERFACE = 3  # of src/kernels.h: a library built from other sources is refused
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # the codes of src/kernels.h
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
OUT_OF_RANGE, OUT_OF_MEMORY = 1, 2  # what functions that can fail return, 0 otherwise

_SIGNATURES: dict[str, tuple[Any, str]] = {  # name: result, arguments: p pointer, i int64, f float
    "quire_interface": (c_int64, ""),
    "quire_level": (ctypes.c_char_p, "i"),
    "quire_use_level": (None, "i"),
    "quire_norm": (None, "iipiiiiippffp"),
    "quire_rope": (c_int64, "ippiiiiiiiippiii"),
    "quire_kv_write": (c_int64, "iippiiiiiiippip"),
    "quire_gate": (None, "ipiiipi"),
    "quire_linear": (None, "pppiiip"),
    "quire_attention": (c_int64, "piipiippiiiiffppp"),
}
_KINDS = {"p": c_void_p, "i": c_int64, "f": c_float}


def _find() -> Path | None:
    here = Path(__file__).parent
    return next((path for suffix in EXTENSION_SUFFIXES if (path := here / f"_kernels{suffix}").exists()), None)


def _openmp() -> str:
    """The OpenMP runtime that torch has mapped, else the system's."""
    maps = Path("/proc/self/maps")
    mapped = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    for name in ("libgomp", "libiomp5"):
        found = sorted((p for p in mapped if Path(p).name.startswith(name)), key=lambda p: "torch" not in p)
        if found:
            return found[0]
    return "libgomp.so.1"


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    path = _find()
    if path is None:
        return None, "the C++ library is not built: install a C++17 compiler, then install quire again"
    try:
        ctypes.CDLL(_openmp(), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the C++ library cannot be loaded: {error}"
    if library.quire_interface() != INTERFACE:
        return None, "the C++ library was built from other sources: install quire again"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [_KINDS[kind] for kind in arguments]
    return library, None


_library, problem = _load()
if problem is not None:
    log.warning("torch's own operators serve on the CPU: %s", problem)


def levels() -> list[str]:
    """The instruction sets this processor can run the kernels with, the best, which is used, first."""
    names: list[str] = []
    while _library is not None and (name := _library.quire_level(len(names))) is not None:
        names.append(name.decode())
    return names


def use_level(index: int) -> None:
    """Compute with levels()[index] from now on, in all threads: for tests. No two levels give the same bits."""
    if not 0 <= index < len(levels()):
        raise ValueError(f"level {index} is not among {levels()}")
    function("use_level")(index)


def function(name: str) -> Callable[..., Any]:
    """A function of the library; without one, what the predicates keep everybody from calling."""
    return getattr(_library, f"quire_{name}") if _library is not None else _missing


def _missing(*arguments: object) -> None:
    raise RuntimeError(str(problem))


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
        return f"reads and writes keys and values in bf16 and fp32, the cache holds {target.kv_format}"
    if target.head_dim % 16:
        return f"needs a head size that is a multiple of 16, the target's is {target.head_dim}"
    return usable(target)
