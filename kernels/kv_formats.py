"""The formats in which keys and values lie in the cache: each a pair of functions, found by name.

    x [..., D] ──encode──▶ codes [..., width], scale ──▶ pages ──▶ codes, scale ──decode──▶ x' [..., D] fp32

A new format is a file that calls `register`, and kernels that serve its name; no caller changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScaleKind = Literal["none", "static", "token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """How one head's key or value of one token is stored.

    storage       dtype of the pages
    width         head_dim -> entries of `storage` per head
    scale         "none"; "static" = one number per head that is given beforehand, [Hk] fp32; "token" = one per token
                  and head, beside the pages, [num_blocks, block_size, Hk] in `scale_dtype`
    encode        (x [..., D] fp32, the static scale [...] or None) -> (codes [..., width], scale [...] or None)
    decode        (codes [..., width], scale [...] or None) -> [..., D] fp32
    rotates_keys  keys are turned by the Hadamard matrix before they are encoded (and stay so when decoded), and queries
                  with them: scores are the same, and no entry of a key stands out
    refuses       head_dim -> why such heads cannot be stored, or None
    """

    name: str
    storage: torch.dtype
    encode: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    decode: Callable[[Tensor, Tensor | None], Tensor]
    width: Callable[[int], int] = lambda head_dim: head_dim
    scale: ScaleKind = "none"
    scale_dtype: torch.dtype = torch.float16
    rotates_keys: bool = False
    refuses: Callable[[int], str | None] = lambda head_dim: None

    def bytes_per_head(self, head_dim: int) -> int:
        """Bytes of one key (or value) of one head."""
        scales = self.scale_dtype.itemsize if self.scale == "token" else 0
        return self.width(head_dim) * self.storage.itemsize + scales


_FORMATS: dict[str, KVFormat] = {}


def register(kv_format: KVFormat) -> KVFormat:
    if kv_format.name in _FORMATS:
        raise ValueError(f"KV format {kv_format.name!r} is registered twice")
    _FORMATS[kv_format.name] = kv_format
    return kv_format


def kv_format(name: str) -> KVFormat:
    """ValueError with the choices for an unknown name."""
    if name not in _FORMATS:
        raise ValueError(f"unknown KV format {name!r}; choose from {', '.join(_FORMATS)}")
    return _FORMATS[name]


def kv_formats() -> tuple[str, ...]:
    return tuple(_FORMATS)
