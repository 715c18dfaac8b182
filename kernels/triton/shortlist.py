"""Which parts of a row can hold a token that the filters keep, found in one pass over the logits.

    summarise   per chunk: its best key, its softmax mass;  per group of 32 columns: the largest logit
    row_head    the chunks merged: the row's largest logit and its mass, as in flash-decoding
    floor       a value that every kept token reaches, from the groups' maxima alone
    shortlist   the groups whose maximum reaches the floor: they hold every token from the floor on, and nothing later
                looks at the others

Each group's maximum is a token. So if k maxima reach a value, k tokens do, and top-k keeps nothing below it; and if the
maxima above a value hold the mass asked for, top-p keeps nothing below it. For k = 50 of 128k columns in 4,000 groups
that leaves about 51 groups, an eightieth of the row.

Softmax here takes two passes: the first keeps (maximum, mass relative to it) per chunk, the second works with the
merged maximum. A chunk's maximum is subtracted before the division by the temperature, so nothing overflows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import GROUP as _GROUP
from .order import order_key, value_of

GROUP = tl.constexpr(_GROUP)
_LOG2E = tl.constexpr(1.4426950408889634)
# The ordered integers of [-inf, 0] have 31 bits; 16 steps leave 15, a value known to a 256th of itself.
_STEPS = tl.constexpr(16)
_LOWEST = tl.constexpr(-0x7F800000)  # of -inf
# The floor of top-p is sought with this much more mass than is asked for, and its bound taken lower by as much: far
# more than the sums' rounding, far less than what would let in another token in a hundred.
_MARGIN = tl.constexpr(1e-4)


@triton.jit
def tempered(values, top, t):
    """(values - top) / t, rounded as the reference rounds it."""
    return tl.div_rn(values - top, t)


@triton.jit
def weight_of(x):
    """exp(x): the mass of a token relative to the most likely one."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def sound(top):
    """Whether a token can be drawn from a row (or chunk) with this maximum: not NaN, +inf or -inf."""
    return tl.abs(top) < float("inf")


@triton.jit
def load_chunk(logits, stride, row, chunk, V, CHUNK: tl.constexpr):
    """A chunk of a row, its ids and its best key; columns past the end are -inf and lose to all others."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * stride + ids, mask=ids < V, other=-float("inf"))
    return values, ids, tl.max(order_key(values, ids), axis=0)


@triton.jit
def summarise(values, top, t, masses, leaders, row, chunk, chunks, groups, CHUNK: tl.constexpr):
    """Store a chunk's mass relative to its maximum, and its groups' maxima.

    values [CHUNK] with -inf in place of NaN; top is their maximum, or 0 where that is not finite.
    """
    tl.store(masses + row * chunks + chunk, tl.sum(weight_of(tempered(values, top, t)), axis=0))
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    maxima = tl.max(tl.reshape(values, (CHUNK // GROUP, GROUP)), axis=1)
    tl.store(leaders + row * groups + group, maxima, mask=group < groups)


@triton.jit
def row_best(best, row, chunks, CHUNKS: tl.constexpr):
    """The key of a row's first token."""
    of_chunk = tl.arange(0, CHUNKS)
    # A chunk that is not there repeats the first one.
    return tl.max(tl.load(best + row * chunks + tl.where(of_chunk < chunks, of_chunk, 0)), axis=0)


@triton.jit
def row_mass(best, masses, row, top, t, chunks, CHUNKS: tl.constexpr):
    """Σ exp((logit - top) / t) of a sound row."""
    of_chunk = tl.arange(0, CHUNKS)
    inside = of_chunk < chunks
    tops = value_of(tl.load(best + row * chunks + tl.where(inside, of_chunk, 0)))
    mass = tl.load(masses + row * chunks + of_chunk, mask=inside, other=0.0)
    return tl.sum(mass * weight_of(tempered(tops, top, t)), axis=0)


@triton.jit
def reached(x, weights, goal):
    """A value c with Σ weights[x ≥ c] ≥ goal, among the largest; -inf if there is none. x ≤ 0."""
    keys = -(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    low, high = _LOWEST, 1
    for _ in range(_STEPS):
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(keys >= middle, weights, 0.0), axis=0) >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return -((-low).to(tl.float32, bitcast=True))


@triton.jit
def floor_of(x, inside, k, p, min_p, mass, V):
    """A value that every token kept by the filters reaches. x: the groups' maxima, tempered; mass: of the row."""
    floor = -float("inf")
    if (k > 0) & (k < V):
        # Top-p after top-k needs the mass of all k tokens, those included that it then removes.
        floor = reached(x, inside.to(tl.float32), k.to(tl.float32))
    else:
        if p < 1:
            goal = p * mass * (1 + _MARGIN)
            floor = reached(x, tl.where(inside, weight_of(x), 0.0), goal)
            # All tokens below this share of the mass together hold less than the 1 - p that may go.
            floor = tl.maximum(floor, tl.log((1 - p) * mass / V) - _MARGIN)
        if min_p > 0:
            floor = tl.maximum(floor, tl.log(min_p))
    return floor


@triton.jit
def write_shortlist(x, floor, group, inside, shortlist, count, floors, row, groups):
    """Store the floor, the numbers of the groups that reach it, in order, and how many there are."""
    live = inside & (x >= floor)
    place = tl.cumsum(live.to(tl.int32), axis=0) - 1
    tl.store(shortlist + row * groups + place, group, mask=live)
    tl.store(count + row, tl.sum(live.to(tl.int32), axis=0))
    tl.store(floors + row, floor)


@triton.jit
def load_leaders(leaders, row, groups, GROUPS: tl.constexpr):
    """A row's group maxima, their numbers, and which exist; -inf where none does."""
    group = tl.arange(0, GROUPS)
    inside = group < groups
    return tl.load(leaders + row * groups + group, mask=inside, other=-float("inf")), group, inside
