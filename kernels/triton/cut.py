"""The exact cut of a filter, without sorting: the smallest beginning of a row's ranking that is large enough.

Keys (`order.py`) have no equals, so a filter keeps a beginning of the ranking: the tokens whose key is at least a cut.
The cut is found by eight-way search over the keys' integers: each pass adds up what lies above eight pivots and leaves
an eighth of the interval; it ends when one token is left in it, after 17 passes at most and about 6 in practice.

Why not sampling by rejection (as FlashInfer does), which needs no exact cut: it draws other tokens from the same noise.
Here a seed gives the reference's token on every device. The work is the same: a few passes over the shortlist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import BEFORE_ALL, ID_SPAN, order_key
from .shortlist import GROUP, tempered, weight_of

_PIVOTS = tl.constexpr(8)
# Shortlisted columns per step. The usual top-k of 50 in 128k columns has 51 groups: a tile that stays in registers and
# one that streams. 1024 keys against eight pivots take 179 registers of 256 threads; with 2048 they spill.
TILE = tl.constexpr(1024)
_MANY = tl.constexpr(1 << 30)


@triton.jit
def load_shortlisted(line, shortlist, count, start, top, t, shift, V, TILE: tl.constexpr):
    """TILE columns of a row's live groups: tempered values less shift, ids, keys; BEFORE_ALL where there is none."""
    slot = start + tl.arange(0, TILE)
    inside = slot // GROUP < count
    ids = tl.load(shortlist + slot // GROUP, mask=inside, other=0) * GROUP + slot % GROUP
    inside &= ids < V
    x = tempered(tl.load(line + ids, mask=inside, other=-float("inf")), top, t) - shift
    return x, ids, tl.where(inside, order_key(x, ids), BEFORE_ALL)


@triton.jit
def mass_from(line, shortlist, count, cut, top, t, V, TILE: tl.constexpr):
    """The mass of the tokens from a cut on, float64."""
    mass = tl.zeros((), tl.float64)
    for start in range(0, count * GROUP, TILE):
        x, _, keys = load_shortlisted(line, shortlist, count, start, top, t, 0.0, V, TILE)
        mass += tl.sum(tl.where(keys >= cut, weight_of(x), 0.0), axis=0).to(tl.float64)
    return mass


@triton.jit
def _above(keys, x, pivots, BY_COUNT: tl.constexpr):
    """How many tokens of a tile lie from each pivot on, and their mass (0 where only the count is wanted)."""
    above = keys[:, None] >= pivots[None, :]
    tokens = tl.sum(above.to(tl.int32), axis=0)
    if BY_COUNT:
        masses = tokens * 0.0
    else:
        masses = tl.sum(tl.where(above, weight_of(x)[:, None], 0.0), axis=0)
    return tokens, masses.to(tl.float64)


@triton.jit
def search(line, shortlist, count, cut, goal, top, t, shift, V, BY_COUNT: tl.constexpr, TILE: tl.constexpr):
    """The largest key from which on there are `goal` tokens (BY_COUNT), or a mass of `goal`; never below `cut`.

    The first tile, often the only one, stays in registers. Sums are over tiles of fixed places, so each is monotonic
    in the pivot, and the same in every run.
    """
    first, _, first_keys = load_shortlisted(line, shortlist, count, 0, top, t, shift, V, TILE)
    low = cut
    width = 1 - cut  # 1 is above every key: values are at most 0
    between = _MANY
    while (width > 1) & (between > 1):
        pivots = low + (width * tl.arange(0, _PIVOTS) >> 3)
        tokens, masses = _above(first_keys, first, pivots, BY_COUNT)
        for start in range(TILE, count * GROUP, TILE):
            x, _, keys = load_shortlisted(line, shortlist, count, start, top, t, shift, V, TILE)
            more_tokens, more_mass = _above(keys, x, pivots, BY_COUNT)
            tokens += more_tokens
            masses += more_mass
        if BY_COUNT:
            enough = tokens >= goal
        else:
            enough = masses >= goal
        between = tl.min(tl.where(enough, tokens, _MANY), axis=0) - tl.max(tl.where(enough, 0, tokens), axis=0)
        # The pivots ascend, so those with enough come first; the last of them is the new low. At least the lowest
        # counts as one of them: a goal that rounding puts out of reach keeps all.
        reached = tl.maximum(tl.sum(enough.to(tl.int64), axis=0), 1)
        high = low + (width * reached >> 3)
        low += width * (reached - 1) >> 3
        width = high - low
    return low


@triton.jit
def lowest_key(floor):
    """The key from which on tokens reach a floor."""
    return order_key(floor, ID_SPAN - 1)


@triton.jit
def cut_of(line, shortlist, count, floor, k, p, min_p, mass, top, t, V, TILE: tl.constexpr):
    """The key from which on the filters keep tokens. mass: of the whole row.

    All tokens from the floor on are in the shortlist, and the cut is never below it: so it holds for the whole row.
    """
    cut = lowest_key(floor)
    mass = mass.to(tl.float64)
    if (k > 0) & (k < V):
        cut = search(line, shortlist, count, cut, k, top, t, 0.0, V, True, TILE)
        mass = mass_from(line, shortlist, count, cut, top, t, V, TILE)
    if p < 1:
        # However small p is, the first token stays.
        goal = tl.maximum(p.to(tl.float64) * mass, 1e-30)
        cut = search(line, shortlist, count, cut, goal, top, t, 0.0, V, False, TILE)
    if min_p > 0:
        cut = tl.maximum(cut, lowest_key(tl.minimum(tl.log(min_p), 0.0)))
    return cut
