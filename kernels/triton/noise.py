"""The reference's noise inside a kernel: the same words and uniforms bit for bit, Gumbel noise to the last bit or two.

See `reference/noise.py` for what the counter holds. Philox makes four words at a time, for four neighbouring columns;
a tile that wants whole rows asks by quads of columns and pays for each word once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference.noise import Purpose

SAMPLE = tl.constexpr(int(Purpose.SAMPLE))
DRAFT = tl.constexpr(int(Purpose.DRAFT))
ACCEPT = tl.constexpr(int(Purpose.ACCEPT))
BONUS = tl.constexpr(int(Purpose.BONUS))

_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)  # the largest float32 under 1


@triton.jit
def mix(seed):
    """The finaliser of SplitMix64: int64 to uint64."""
    z = seed.to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def words(seed, sample_index, position, purpose, quads):
    """Four uint32 for each quad of columns; seed, sample_index and position are int64 scalars.

    Only a counter's low 32 bits count, as in the reference. The words that all lanes share stay scalars through the
    first rounds.
    """
    key = mix(seed)
    return tl.random.philox_impl(
        quads.to(tl.uint32),
        position.to(tl.uint32),
        sample_index.to(tl.uint32),
        (sample_index * 0 + purpose).to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
        10,
    )


@triton.jit
def to_uniform(word):
    """A word to (0, 1), float32."""
    return tl.minimum((word.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), _BELOW_ONE)


@triton.jit
def to_gumbel(word):
    """A word to standard Gumbel noise, -log(-log(1 - u)), float32.

    There is no log1p here. 1 - u loses the low bits of a small u, which decide who wins; what it lost is known
    exactly (Sterbenz), and log(v + lost) = log(v) + lost / v up to lost² < 2⁻⁵⁰.
    """
    u = to_uniform(word)
    v = 1.0 - u
    lost = (1.0 - v) - u
    return -tl.log(-(tl.log(v) + lost / v))


@triton.jit
def pick(w0, w1, w2, w3, columns):
    """Each column's own word of its quad's four."""
    place = columns & 3
    return tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))


@triton.jit
def uniform_at(seed, sample_index, position, purpose, columns):
    """Uniform noise of chosen columns."""
    w0, w1, w2, w3 = words(seed, sample_index, position, purpose, columns >> 2)
    return to_uniform(pick(w0, w1, w2, w3, columns))


@triton.jit
def gumbel_at(seed, sample_index, position, purpose, columns):
    """Gumbel noise of chosen columns."""
    w0, w1, w2, w3 = words(seed, sample_index, position, purpose, columns >> 2)
    return to_gumbel(pick(w0, w1, w2, w3, columns))


@triton.jit
def gumbel_of(seed, sample_index, position, purpose, quads):
    """Gumbel noise of whole quads [N] of columns, [4 · N] in the order of the columns."""
    w0, w1, w2, w3 = words(seed, sample_index, position, purpose, quads)
    return to_gumbel(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
