"""How a kernel module says which compiled forms of its kernels it launches: they are compiled without a GPU too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHES = (80, 90, 100)  # A100, H100, B200


@dataclass(frozen=True, slots=True)
class Specialization:
    """One kernel as the JIT would specialize it for one launch.

    name: unique in its module, as "decode/d128/bf16".
    signature: the type of every argument that is not a constexpr: "*bf16:16", "i32", "i32:16", "fp32". ":16" says that
        the address or the number is a multiple of 16, which the JIT finds out by itself and wide loads depend on.
    constexprs: every constexpr, and every integer argument that is 1 at run time (the JIT makes a constant of it).
    arches: compute capabilities times ten; leave out what a format does not exist on.
    needs: what the PTX must contain: "mma" for tensor cores, "wide" for 128-bit loads or copies from global memory.
    """

    name: str
    kernel: Any  # a triton.JITFunction
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    arches: tuple[int, ...] = ARCHES
    needs: tuple[str, ...] = ()
