"""The order of tokens as one integer: the larger value first, of equals the lower id, NaN before every number.

    key = value as an ordered integer · 2²⁰ - id

Every choice between tokens (argmax, top-k, ties at a cut) is then one comparison, and no two tokens are equal: the
result does not depend on the order in which programs and lanes meet the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

ID_SPAN = tl.constexpr(1 << 20)  # ids are below it
BEFORE_ALL = tl.constexpr(-(1 << 60))  # under every key

# Columns of a row that one program takes: 16 KB, four 128-bit loads in flight in each of 256 threads. It does not
# depend on the number of rows, so a row's sums are rounded the same in any company; a lone row of 128k still spreads
# over 32 programs.
CHUNK = 4096
# Columns whose maximum is noted: one 128-byte line of float32.
GROUP = 32


def chunk_of(vocab: int) -> int:
    """The columns per program for rows of `vocab` logits; raises ValueError where an id does not fit a key."""
    if not 0 < vocab < ID_SPAN.value:
        raise ValueError(f"vocabulary size {vocab}: must be between 1 and {ID_SPAN.value - 1}")
    return min(CHUNK, max(GROUP, triton.next_power_of_2(vocab)))


@triton.jit
def ordered(v):
    """float32 as int32 that compare alike: -0 equals 0, and NaN is the largest."""
    bits = tl.where(v == 0, 0.0, v).to(tl.int32, bitcast=True)
    return tl.where(v != v, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def order_key(v, ids):
    """The keys (int64) of values (float32) at ids below 2²⁰."""
    return ordered(v).to(tl.int64) * ID_SPAN - ids


@triton.jit
def id_of(key):
    """The id in a key, int32."""
    return (-key & (ID_SPAN - 1)).to(tl.int32)


@triton.jit
def value_of(key):
    """The value in a key, float32."""
    bits = ((key + id_of(key)) // ID_SPAN).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
