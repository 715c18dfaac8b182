"""Which replica: the one that holds most, unless it is overloaded; nothing is remembered beyond its bound."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.deploy.ray.routing import OPEN_CHUNKS, Fleet, Held

# Chains of a tree of prompts: each name has one parent, as names of chunks have.
CHAINS = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(
    lambda path: tuple(bytes(path[: i + 1]) for i in range(len(path)))
)
NAMES = ("a", "b", "c", "d")


def made(*replicas: str, open_chunks: float = OPEN_CHUNKS) -> Fleet:
    fleet = Fleet(open_chunks, seed=1)
    fleet.keep(replicas)
    return fleet


def path(*steps: int) -> tuple[bytes, ...]:
    return tuple(bytes(steps[: i + 1]) for i in range(len(steps)))


@given(st.lists(CHAINS, max_size=40), st.integers(0, 30))
def test_memory_is_bounded_and_what_was_sent_last_is_found(sent: list[tuple[bytes, ...]], capacity: int) -> None:
    held = Held(capacity)
    for chain in sent:
        held.add(chain)
        assert len(held) <= capacity
        assert held.match(chain) == min(len(chain), capacity)


@given(st.lists(CHAINS, max_size=40), st.integers(1, 30), CHAINS)
def test_what_is_held_can_be_reached_from_its_beginning(
    sent: list[tuple[bytes, ...]], capacity: int, asked: tuple[bytes, ...]
) -> None:
    """The least recently used ends go first: a name whose beginning was forgotten would be worth nothing."""
    held = Held(capacity)
    for chain in sent:
        held.add(chain)
    matched = held.match(asked)
    assert all(name not in held._names for name in asked[matched:])


def test_a_conversation_goes_back_to_where_it_was() -> None:
    fleet = made(*NAMES)
    for name in NAMES:
        fleet.sent(name, path(NAMES.index(name), 1, 2, 3))
    for name in NAMES:
        assert fleet.rank(path(NAMES.index(name), 1, 2, 3, 4), {})[0] == name


@pytest.mark.parametrize("matched", [1, 16, 40, 160])
def test_a_prefix_is_worth_so_many_open_requests_and_no_more(matched: int) -> None:
    fleet = made("near", "idle")
    chain = path(*[1] * matched)
    fleet.sent("near", chain)
    worth = matched / OPEN_CHUNKS
    for open in range(20):
        expected = "near" if open < worth else "idle"
        if open != worth:
            assert fleet.rank(chain, {"near": open, "idle": 0})[0] == expected


@given(
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 50), min_size=1),
    st.lists(st.tuples(st.sampled_from(NAMES), CHAINS), max_size=20),
    CHAINS,
    st.sets(st.sampled_from(NAMES)),
)
def test_every_replica_has_one_place_and_those_to_avoid_have_none(
    open: dict[str, int], sent: list[tuple[str, tuple[bytes, ...]]], chain: tuple[bytes, ...], avoid: set[str]
) -> None:
    fleet = Fleet(seed=0)
    fleet.keep(open)
    for name, told in sent:
        fleet.sent(name, told)  # of a replica that is not there, nothing is kept
    ranked = fleet.rank(chain, open, avoid)
    assert sorted(ranked) == sorted(open.keys() - avoid)
    if ranked:
        worth = {name: fleet.match(name, chain) - OPEN_CHUNKS * open[name] for name in ranked}
        best = max(ranked, key=lambda name: fleet.match(name, chain))
        assert worth[ranked[0]] >= worth[best], "whoever holds most is beaten by less work only"


def test_without_prefixes_the_less_busy_of_two_is_taken() -> None:
    """Of four, one is busy: it is never taken, and the busiest but one rarely."""
    fleet = made(*NAMES)
    open = {"a": 9, "b": 3, "c": 2, "d": 1}
    firsts = Counter(fleet.rank((), open)[0] for _ in range(2000))
    assert firsts["a"] == 0
    assert firsts["d"] > firsts["c"] > firsts["b"]


def test_equal_replicas_share_equally() -> None:
    fleet = made(*NAMES)
    firsts = Counter(fleet.rank((), {})[0] for _ in range(2000))
    assert min(firsts.values()) > 400


def test_a_new_engine_and_a_new_replica_hold_nothing() -> None:
    fleet = made("a", "b")
    chain = path(1, 2, 3)
    fleet.told("a", capacity=100, engine=0)
    fleet.sent("a", chain)
    fleet.told("a", capacity=100, engine=0)
    assert fleet.match("a", chain) == 3
    fleet.told("a", capacity=100, engine=1)
    assert fleet.match("a", chain) == 0
    fleet.sent("b", chain)
    fleet.keep(("a",))
    fleet.keep(("a", "b"))
    assert fleet.match("b", chain) == 0


def test_a_smaller_cache_forgets_what_it_has_no_room_for() -> None:
    fleet = made("a")
    fleet.sent("a", path(1, 2, 3, 4))
    fleet.told("a", capacity=2, engine=0)
    assert fleet.match("a", path(1, 2, 3, 4)) == 2


def test_load_stays_even_under_one_popular_prefix() -> None:
    """All requests begin alike; each stays open for a while. Were only prefixes to count, one replica had them all."""

    def spread(open_chunks: float) -> int:
        fleet, draw = made(*NAMES, open_chunks=open_chunks), random.Random(2)
        chain, open, running = path(*[5] * 30), Counter[str](), []
        worst = 0
        for _ in range(400):
            name = fleet.rank(chain, open)[0]
            fleet.sent(name, chain)
            open[name] += 1
            running.append(name)
            if len(running) > 40:
                open[running.pop(draw.randrange(len(running)))] -= 1
            worst = max(worst, max(open.values()) - min(open[name] for name in NAMES))
        return worst

    assert spread(OPEN_CHUNKS) <= 10
    assert spread(0) > 30
