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
TRIALS = 30  # of an order that draws lots, to estimate its mean


class Optimum(NamedTuple):
    """Belady's misses, and for each request the right bit: was its page given up before its next request?"""

    misses: int
    discards: list[int]


def belady(trace: list[int], capacity: int) -> Optimum:
    """Gives up the page that is requested again last, or never."""
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


class KeepsTheUseless(Discard[int]):
    """Believes the opposite of every bit."""

    def add(self, page: int, bit: int, *, covered: bool = False) -> None:
        super().add(page, 1 - bit, covered=covered)


class NewestFirst(Discard[int]):
    """Right about discards; without any it gives up what was requested last."""

    def victim(self) -> int:
        if self._discards:
            return super().victim()
        page = next(reversed(self._pages))
        self.remove(page)
        return page


@pytest.mark.parametrize(("broken", "flip"), [(Lru, 0.0), (KeepsTheUseless, 0.0), (NewestFirst, 0.1)])
def test_the_bound_tells_broken_orders(broken: Callable[[], Order[int]], flip: float) -> None:
    assert discard_excess(broken, 1000, flip) > 0


def phase_excess(order: Callable[[int], Order[int]], count: int, flip: float) -> float:
    """The most by which an order's mean exceeds 2 OPT + H_k eta0 + eta1, or 2 H_k OPT, and k misses to begin with."""
    draw, worst = random.Random(4), -math.inf
    cycles = [([i % (k + 1) for i in range(20 * k)], k) for k in (8, 16)]
    moves = [([i // (9 * k) * k + i % k for i in range(27 * k)], k) for k in (8, 16)]  # other pages now and then
    for trace, capacity in [*traces(count, seed=5), *cycles, *moves]:
        opt, right = belady(trace, capacity).misses, phase_bits(trace, capacity)
        bits = flipped(right, flip, draw)
        eta0 = sum(r == 1 and said == 0 for r, said in zip(right, bits, strict=True))
        eta1 = sum(r == 0 and said == 1 for r, said in zip(right, bits, strict=True))
        log = harmonic(capacity)
        bound = min(2 * opt + log * eta0 + eta1, 2 * log * opt) + capacity
        worst = max(worst, sum(misses(order(seed), trace, bits, capacity) for seed in range(TRIALS)) / TRIALS - bound)
    return worst


@pytest.mark.parametrize("flip", FLIPS)
def test_phase_misses_a_constant_times_opt_and_no_more_than_marking_does(flip: float) -> None:
    assert phase_excess(Phase, 250, flip) <= 0


class MarkedFirst(Phase[int]):
    """Gives up what was requested last."""

    def victim(self) -> int:
        page = next(reversed(self._pages))
        self.remove(page)
        return page


@pytest.mark.parametrize("broken", [lambda seed: Lru(), MarkedFirst], ids=["lru", "marked-first"])
def test_the_phase_bound_tells_broken_orders(broken: Callable[[int], Order[int]]) -> None:
    assert phase_excess(broken, 250, 0.0) > 0


def test_right_discards_are_optimal() -> None:
    for trace, capacity in traces(1000, seed=6):
        optimum = belady(trace, capacity)
        assert misses(Discard(), trace, optimum.discards, capacity) == optimum.misses
