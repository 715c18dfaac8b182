"""Encoding keys and values into the formats of the cache, in registers; kv_pages.py reads what this writes.

Codes are those of the reference, bit for bit where the values are: the same division, rounding and sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..batch import KVSpec
from .hadamard import rotated
from .kv_pages import E4M3, INT4, INT8, PLAIN, coding_of
from .support import rint

_LEAST_SCALE = tl.constexpr(2.0**-14)  # as the reference's: the smallest fp16 that is no subnormal
_LARGEST_SCALE = tl.constexpr(65504.0)


@dataclass(frozen=True, slots=True)
class Codes:
    """What the compiler knows of the heads that are written."""

    coding: int
    heads: int
    head_dim: int

    @property
    def rows(self) -> int:
        """Of a tile of all heads of a token."""
        return _power_of_two(self.heads)

    @property
    def columns(self) -> int:
        return _power_of_two(self.head_dim)

    @property
    def stages(self) -> int:
        """Of the rotation."""
        return self.columns.bit_length() - 1

    @property
    def width(self) -> int:
        """Entries of a page per head."""
        return self.head_dim // 2 if self.coding == INT4.value else self.head_dim

    @property
    def static_scales(self) -> bool:
        return self.coding == E4M3.value


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def codes_of(spec: KVSpec) -> Codes:
    return Codes(coding_of(spec), spec.num_kv_heads, spec.head_dim)


@triton.jit
def store_heads(x, pages, scales, slot, KEYS: tl.constexpr, CODES: tl.constexpr):
    """Encode the heads of one token, x [rows, columns] fp32, and store them with their scales at a slot.

    KEYS: x are keys, which int4 rotates. pages of fp8 are given as bytes.
    """
    ROWS: tl.constexpr = CODES.rows
    COLUMNS: tl.constexpr = CODES.columns
    STAGES: tl.constexpr = CODES.stages
    head = tl.arange(0, ROWS)
    dims = tl.arange(0, COLUMNS)
    there = head < CODES.heads
    inside = there[:, None] & (dims < CODES.head_dim)[None, :]
    place = slot * CODES.heads + head  # of a head among all of the cache
    if CODES.coding == PLAIN:
        tl.store(pages + place[:, None] * CODES.width + dims[None, :], x.to(pages.dtype.element_ty), mask=inside)
    elif CODES.coding == E4M3:
        scale = tl.load(scales + head, mask=there, other=1.0)
        code = e4m3_code(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
        tl.store(pages + place[:, None] * CODES.width + dims[None, :], code, mask=inside)
    elif CODES.coding == INT8:
        scale = _token_scale(x, 127.0)
        scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        code = rint(tl.minimum(tl.maximum(scaled, -127.0), 127.0)).to(tl.int8)
        tl.store(pages + place[:, None] * CODES.width + dims[None, :], code, mask=inside)
        tl.store(scales + place, scale.to(tl.float16), mask=there)
    else:
        if KEYS:
            x = rotated(x, ROWS, COLUMNS, STAGES)
        scale = _token_scale(x, 7.5)
        scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)) + 7.5
        code = rint(tl.minimum(tl.maximum(scaled, 0.0), 15.0)).to(tl.uint8)
        # [.., half, i] -> [.., i, half]: the entries i and i + D / 2 share a byte
        halves = tl.permute(tl.reshape(code, [ROWS, 2, CODES.width]), [0, 2, 1])
        low, high = tl.split(halves)
        byte = tl.arange(0, CODES.width)
        tl.store(pages + place[:, None] * CODES.width + byte[None, :], low | (high << 4), mask=there[:, None])
        tl.store(scales + place, scale.to(tl.float16), mask=there)


@triton.jit
def _token_scale(x, LEVELS: tl.constexpr):
    """max |x| / LEVELS per row as fp16 will hold it, in fp32."""
    largest = tl.max(tl.abs(x), 1)
    scale = tl.div_rn(largest, tl.full(largest.shape, LEVELS, tl.float32))
    return tl.minimum(tl.maximum(scale, _LEAST_SCALE), _LARGEST_SCALE).to(tl.float16).to(tl.float32)


@triton.jit
def e4m3_code(x):
    """fp32 to the byte of float8 e4m3: clamped to ±448, to nearest even; NaN is 127.

    By the bits, since sm_80 has no such conversion, and the interpreter's is not exact.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # exponents 2^120 apart
    subnormal = rint(size * 512.0).to(tl.int32)  # the next code behind them is the first normal one
    code = tl.where(size < 0.015625, subnormal, normal)
    return tl.where(x != x, 0x7F, code | sign).to(tl.uint8)
