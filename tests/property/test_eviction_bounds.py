"""What is proved of the eviction orders, on thousands of small traces against the offline optimum by brute force."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from quire.scheduler.eviction import Discard, Lru, Order, Paging, Phase

CAPACITIES = range(2, 7)
FLIPS = (0.0, 0.1, 0.2, 0.35, 0.5, 1.0)
TRIALS = 40  # of what draws lots, to estimate its mean


class Optimum(NamedTuple):
    """Belady's misses, and for each request the right bit: was its page given up before its next request?"""

    misses: int
    discards: list[int]


def belady(trace: list[int], capacity: int) -> Optimum:
    """Farthest in the future; a page that is never requested again counts as given up."""
    following, seen = [math.inf] * len(trace), {}
    for i in reversed(range(len(trace))):
        following[i] = seen.get(trace[i], math.inf)
        seen[trace[i]] = i
    cached: dict[int, int] = {}  # page -> its last request
    misses, discards = 0, [0] * len(trace)
    for i, page in enumerate(trace):
        if page not in cached:
            misses += 1
            if len(cached) == capacity:
                victim = max(cached, key=lambda p: following[cached[p]])
                discards[cached.pop(victim)] = 1
        cached[page] = i
    for i in cached.values():
        discards[i] = int(following[i] == math.inf and discards[i] == 0) and discards[i]
    return Optimum(misses, discards)


def optimum_by_search(trace: list[int], capacity: int) -> int:
    """The fewest misses of any choices whatever."""
    states = {frozenset(): 0}
    for page in trace:
        after: dict[frozenset[int], int] = {}
        for cached, misses in states.items():
            if page in cached:
                options = [(cached, misses)]
            elif len(cached) < capacity:
                options = [(cached | {page}, misses + 1)]
            else:
                options = [(cached - {victim} | {page}, misses + 1) for victim in cached]
            for state, cost in options:
                after[state] = min(cost, after.get(state, cost))
        states = after
    return min(states.values())


def phase_bits(trace: list[int], capacity: int) -> list[int]:
    """For each request 1 unless its page is requested again in the next phase, a maximal run of `capacity` pages."""
    phases, current = [], set()
    for page in trace:
        if page not in current and len(current) == capacity:
            phases.append(current)
            current = set()
        current.add(page)
    phases += [current, set()]
    bits, number, current = [], 0, set()
    for page in trace:
        if page not in current and len(current) == capacity:
            number, current = number + 1, set()
        current.add(page)
        bits.append(int(page not in phases[number + 1]))
    return bits


def traces(count: int, seed: int) -> Iterator[tuple[list[int], int]]:
    """Random, cyclic, skewed, and phased traces, with a number of pages to cache."""
    draw = random.Random(seed)
    for i in range(count):
        capacity = draw.choice(CAPACITIES)
        pages, length = capacity + draw.randint(1, 4), draw.randint(20, 60)
        match i % 4:
            case 0:
                trace = [draw.randrange(pages) for _ in range(length)]
            case 1:
                trace = [j % pages for j in range(length)]
            case 2:
                trace = [min(int(draw.expovariate(0.4)), 3 * capacity) for _ in range(length)]
            case _:
                trace = [j // 8 % 3 * 2 + draw.randrange(capacity) for j in range(length)]
        yield trace, capacity


def flipped(bits: list[int], share: float, draw: random.Random) -> list[int]:
    return [bit ^ (draw.random() < share) for bit in bits]


def misses(order: Order[int], trace: list[int], bits: list[int], capacity: int) -> int:
    cache = Paging(capacity, order)
    return sum(not cache.request(page, bit) for page, bit in zip(trace, bits, strict=True))


def harmonic(k: int) -> float:
    return sum(1 / i for i in range(1, k + 1))


def discard_excess(order: Callable[[], Order[int]], count: int, flip: float) -> float:
    """The most by which an order exceeds OPT + (k - 1) eta0 + eta1 on any trace; at most 0 if the bound holds."""
    draw, worst = random.Random(1), -math.inf
    for trace, capacity in traces(count, seed=2):
        optimum = belady(trace, capacity)
        bits = flipped(optimum.discards, flip, draw)
        eta0 = sum(right == 1 and said == 0 for right, said in zip(optimum.discards, bits, strict=True))
        eta1 = sum(right == 0 and said == 1 for right, said in zip(optimum.discards, bits, strict=True))
        bound = optimum.misses + (capacity - 1) * eta0 + eta1
        worst = max(worst, misses(order(), trace, bits, capacity) - bound)
    return worst


def test_the_oracle_is_optimal() -> None:
    for trace, capacity in traces(200, seed=3):
        if capacity <= 4:
            assert belady(trace, capacity).misses == optimum_by_search(trace, capacity)


@pytest.mark.parametrize("flip", FLIPS)
def test_discard_misses_at_most_opt_and_what_its_errors_cost(flip: float) -> None:
    assert discard_excess(Discard, 1000, flip) <= 0
