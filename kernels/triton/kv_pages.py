"""Reading keys and values from their pages: codes of any format as exact operands of a matrix product.

    slots ─▶ codes [keys, D] ─▶ numbers in the product's dtype

The scale of fp8, one per head, goes into the softmax scale (keys) and to the end (values). Those of int8 and int4, one
per key, go to the columns of the scores (keys) and of the weights (values).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..batch import KVSpec, LayerKV

# How codes become numbers. Each number fits the 8 significant bits of bf16 and the 11 of fp16, so that nothing is lost.
PLAIN = tl.constexpr(0)
E4M3 = tl.constexpr(1)  # float8 that the processor converts
E4M3_BITS = tl.constexpr(2)  # the same from its bytes, where the processor cannot (sm_80)
INT8 = tl.constexpr(3)
INT4 = tl.constexpr(4)

_CODINGS = {"fp8_e4m3": E4M3, "int8_per_token_head": INT8, "int4_per_token_head": INT4}


@dataclass(frozen=True, slots=True)
class Pages:
    """What the compiler knows of a layer's cache."""

    coding: int
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def width(self) -> int:
        """Entries of a page per head."""
        return self.head_dim // 2 if self.coding == INT4.value else self.head_dim

    @property
    def slot(self) -> int:
        """Entries from a slot to the next."""
        return self.kv_heads * self.width

    @property
    def columns(self) -> int:
        """Of a tile: head_dim, rounded up to what a tile can have."""
        return max(16, triton.next_power_of_2(self.head_dim))

    @property
    def tile_width(self) -> int:
        """Entries of a page that a row of a tile is made from."""
        return self.columns // 2 if self.coding == INT4.value else self.columns

    @property
    def token_scales(self) -> bool:
        return self.coding in (INT8.value, INT4.value)

    @property
    def static_scales(self) -> bool:
        return self.coding in (E4M3.value, E4M3_BITS.value)


def coding_of(spec: KVSpec) -> int:
    """One of the constants above; of fp8, the first."""
    return _CODINGS.get(spec.format, PLAIN).value


def describe(cache: LayerKV, arch: int) -> tuple[Pages, torch.Tensor, torch.Tensor]:
    """The cache for the compiler, and its pages in the dtype that the coding reads. arch: compute capability · 10."""
    spec = cache.spec
    coding = coding_of(spec)
    k, v = cache.k, cache.v
    if coding == E4M3.value and arch < 89:
        coding, k, v = E4M3_BITS.value, k.view(torch.uint8), v.view(torch.uint8)
    return Pages(coding, spec.num_kv_heads, spec.head_dim, spec.block_size), k, v


@triton.jit
def head_dims(PAGES: tl.constexpr):
    """The entry of a head that each column of a tile holds: [columns].

    A byte of int4 holds the entries i and i + D / 2, and they become neighbours in the registers that unpack it.
    Queries and outputs, touched once, follow that order; keys and values, touched always, need no exchange.
    """
    columns = tl.arange(0, PAGES.columns)
    if PAGES.coding == INT4:
        columns = columns // 2 + (columns % 2) * PAGES.width
    return columns


@triton.jit
def slots_of(table, keys, there, PAGES: tl.constexpr, MASKED: tl.constexpr):
    """The slots [N] of the keys [N] of the sequence with this row of the block table. 64 bits: caches are large."""
    if MASKED:
        blocks = tl.load(table + keys // PAGES.block_size, mask=there, other=0)
    else:
        blocks = tl.load(table + keys // PAGES.block_size)
    return blocks.to(tl.int64) * PAGES.block_size + keys % PAGES.block_size


@triton.jit
def load_tile(page, slots, there, PAGES: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values at slots [N] without their scales: [N, columns] of DTYPE. page: the first entry of this head.

    Slots that are not there, and columns behind the head, have the code 0: a number, as values must be, for a weight
    of 0 times NaN is NaN.
    """
    columns = tl.arange(0, PAGES.tile_width)
    address = page + slots[:, None] * PAGES.slot + columns[None, :]
    if PAGES.width != PAGES.tile_width:
        inside = columns[None, :] < PAGES.width
        if MASKED:
            inside = inside & there[:, None]
        codes = tl.load(address, mask=inside, other=0.0)
    elif MASKED:
        codes = tl.load(address, mask=there[:, None], other=0.0)
    else:
        codes = tl.load(address)
    if PAGES.coding == INT4:
        return tl.interleave(_nibble(codes & 15, DTYPE), _nibble(codes >> 4, DTYPE))
    elif PAGES.coding == E4M3_BITS:
        return _e4m3(codes, DTYPE)
    else:
        return codes.to(DTYPE)


@triton.jit
def load_scales(scale, slots, there, PAGES: tl.constexpr):
    """The scales of the keys or values at slots: [N] fp32. scale: the first one of this head."""
    return tl.load(scale + slots * PAGES.kv_heads, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _nibble(code, DTYPE: tl.constexpr):
    """code - 7.5 for a code of 0 .. 15, without the slow conversion of integers.

    With an exponent of 4 and the code in the upper four bits of the mantissa, a number is 16 + code.
    """
    if DTYPE == tl.bfloat16:  # noqa: SIM300 - an argument
        return ((code.to(tl.int16) << 3) | 0x4180).to(tl.bfloat16, bitcast=True) - 23.5
    elif DTYPE == tl.float16:  # noqa: SIM300 - an argument
        return ((code.to(tl.int16) << 6) | 0x4C00).to(tl.float16, bitcast=True) - 23.5
    else:
        return code.to(tl.float32) - 7.5


@triton.jit
def _e4m3(code, DTYPE: tl.constexpr):
    """The number of a byte of e4m3: its exponent and mantissa are those of a fp32 that is 2¹²⁰ too small."""
    wide = code.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    number = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), number).to(DTYPE)
