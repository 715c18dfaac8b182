"""The eviction orders one operation at a time, and whether their predictions are to be believed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.scheduler.eviction import Bag, Discard, Lru, Order, Paging, Phase, order_of
from quire.scheduler.ghost import Belady, Guard
from quire.scheduler.predict import (
    DENSE,
    DISCARD_SCORE,
    BlockFacts,
    Features,
    GapKind,
    Gaps,
    Life,
    Logistic,
    Predictor,
    features,
    gap_kind,
    structural_bit,
)

ORDERS = ["lru", "discard", "phase"]


def drain(order: Order[int]) -> list[int]:
    return [order.victim() for _ in range(len(order))]


def life(facts: BlockFacts = BlockFacts(), **changes: object) -> Life:  # noqa: B008
    made = Life(facts, 0.0, 0.0, 0.0)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_an_unknown_order_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'fifo'.*'lru', 'discard', 'phase'"):
        order_of("fifo", 0)


def test_lru_gives_up_the_oldest() -> None:
    order = Lru[int]()
    for page in (1, 2, 3):
        order.add(page, 1)
    order.touch(1)
    assert drain(order) == [2, 3, 1]


def test_discard_gives_up_discards_first_and_then_the_oldest() -> None:
    order = Discard[int]()
    for page, bit in ((1, 0), (2, 1), (3, 0), (4, 1), (5, 0)):
        order.add(page, bit)
    order.predict(5, 1)
    order.predict(2, 0)
    assert drain(order) == [4, 5, 1, 2, 3]


def test_phase_gives_up_nothing_that_was_requested_in_this_phase() -> None:
    order = Phase[int](seed=0)
    for page in range(6):
        order.add(page, page % 2)
    first = order.victim()
    assert first % 2, "all were marked, so a phase ends; then a discard goes first"
    order.touch(0)
    order.add(7, 1)
    assert {order.victim() for _ in range(4)} == {1, 2, 3, 4, 5} - {first}
    assert sorted(drain(order)) == [0, 7]


@pytest.mark.parametrize("name", ORDERS)
def test_no_page_to_give_up_is_an_error(name: str) -> None:
    with pytest.raises((KeyError, IndexError, StopIteration)):
        order_of(name, 0).victim()


@pytest.mark.parametrize("name", ORDERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_order_keeps_its_pages_and_never_gives_up_a_covered_one(name: str, data: st.DataObject) -> None:
    """Pages are chains 0-1-2-3, 4-5-6-7, …: page p continues p - 1. Somebody gives one up, or uses a chain's start."""
    order: Order[int] = order_of(name, 1)
    cached: set[int] = set()

    def covered(page: int) -> bool:
        return page % 4 != 3 and page + 1 in cached

    for _ in range(data.draw(st.integers(1, 30))):
        if cached and data.draw(st.booleans()):
            victim = order.victim() if data.draw(st.booleans()) else order.oldest()
            assert victim in cached
            assert not covered(victim)
            cached.remove(victim)
            if victim % 4 and victim - 1 in cached:
                order.uncover(victim - 1)
        else:
            start = 4 * data.draw(st.integers(0, 3))
            for page in range(start, start + 4):  # somebody uses the chain, head first
                if page in cached:
                    order.remove(page)
                    cached.remove(page)
            for page in reversed(range(start, start + data.draw(st.integers(1, 4)))):
                order.add(page, data.draw(st.integers(0, 1)), covered=page % 4 != 3 and page + 1 in cached)
                cached.add(page)
        for page in sorted(cached):
            order.predict(page, data.draw(st.integers(0, 1)))
        order.check({page: covered(page) for page in cached})


def test_a_bag_is_a_set_that_chooses_each_item_as_often() -> None:
    bag, source = Bag[int](), random.Random(0)
    for i in range(8):
        bag.add(i)
    bag.remove(0)
    bag.remove(7)
    counts = [0] * 8
    for _ in range(6000):
        counts[bag.choose(source)] += 1
    assert counts[0] == counts[7] == 0
    assert all(850 < count < 1150 for count in counts[1:7])


# ---------------------------------------------------------------- the optimum's labels


def test_belady_keeps_what_fits_and_not_more() -> None:
    optimum = Belady(capacity=2)
    since = [optimum.tick() for _ in range(3)]  # pages a, b, c
    optimum.tick()
    assert [optimum.kept(t) for t in since] == [True, True, False]


def test_belady_forgets_what_is_out_of_reach() -> None:
    optimum = Belady(capacity=4)
    since = optimum.tick()
    for _ in range(optimum.reach + 1):
        optimum.tick()
    assert not optimum.kept(since)


# ---------------------------------------------------------------- the guard


def play(bits_right: bool, returning: int, guard: Guard) -> Guard:
    """Half the uses are of blocks never used again, the others of `returning` blocks in turn."""
    for i in range(3000):
        fresh, back = b"n%d" % i, b"r%d" % (i % returning)
        guard.request(fresh, int(bits_right), again=False)
        guard.request(back, int(not bits_right), again=i >= returning)
    return guard


def test_the_guard_trusts_bits_that_are_right() -> None:
    assert play(True, 48, Guard(64, Discard())).trusted


def test_the_guard_leaves_bits_that_are_wrong_and_takes_them_up_again() -> None:
    guard = play(False, 24, Guard(64, Discard()))
    assert not guard.trusted, "LRU finds all of them"
    assert play(True, 48, guard).trusted, "LRU finds none of them"


# ---------------------------------------------------------------- predictors


@pytest.mark.parametrize(
    ("given_life", "bit"),
    [
        (life(), None),
        (life(BlockFacts(depth=3, generated=True)), 1),
        (life(BlockFacts(depth=3, generated=True, session_turn=True)), 0),
        (life(BlockFacts(depth=3, generated=True), hits=1), 0),
        (life(BlockFacts(depth=3, sample=True)), 1),
        (life(children=2), 0),
        (life(hits=2), 0),
        (life(hits=5, orphan=True), 1),
    ],
)
def test_structure(given_life: Life, bit: int | None) -> None:
    assert structural_bit(given_life) == bit


def test_gaps_know_the_share_that_comes_back_in_time_of_those_that_waited_as_long() -> None:
    gaps, kind = Gaps(), GapKind(1, 0, False)
    for _ in range(25):
        gaps.observe(kind, 1.0)
        gaps.observe(kind, 100.0)
        gaps.observe(kind, float("inf"))
        gaps.observe(kind, float("inf"))
    assert gaps.probability(kind, 0.0, 10.0) == pytest.approx(0.25)
    assert gaps.probability(kind, 0.0, 1000.0) == pytest.approx(0.5)
    assert gaps.probability(kind, 10.0, 1000.0) == pytest.approx(1 / 3)
    assert gaps.probability(kind, 0.0, float("inf")) == pytest.approx(0.5)
    assert gaps.probability(GapKind(2, 0, False), 0.0, 10.0) is None


def test_gaps_remember_a_fixed_number_of_observations() -> None:
    gaps, kind = Gaps(), GapKind(0, 0, False)
    for _ in range(10_000):
        gaps.observe(kind, 1.0)
    for _ in range(Gaps.MEMORY):
        gaps.observe(kind, float("inf"))
    chance = gaps.probability(kind, 0.0, 10.0)
    assert chance is not None
    assert chance < 0.5, "the old observations have faded"


def test_logistic_regression_learns_a_tenant_and_a_feature() -> None:
    model, draw = Logistic(), random.Random(0)
    for _ in range(2000):
        generated, tenant = draw.random() < 0.5, draw.randrange(4)
        x = Features((1.0, float(generated), *[0.0] * (DENSE - 2)), tenant)
        model.train(x, int(generated or tenant == 3))
    for generated in (False, True):
        for tenant in range(4):
            x = Features((1.0, float(generated), *[0.0] * (DENSE - 2)), tenant)
            assert (model.score(x) > DISCARD_SCORE) == (generated or tenant == 3)


def test_features_have_their_number_and_stay_small() -> None:
    old = life(BlockFacts(depth=8191, generated=True, tenant="ü"), hits=10**6, released=1e6)
    for idle, horizon in ((0.0, 0.0), (1e6, 1.0), (1.0, float("inf"))):
        x = features(old, idle, horizon, 0.5)
        assert len(x.dense) == DENSE
        assert all(abs(value) <= 4 for value in x.dense)


def test_an_orphan_is_always_given_up_first() -> None:
    predictor, lost = Predictor(), life(hits=9, orphan=True)
    assert predictor.bit(lost, predictor.look(lost, 0.0, 10.0)) == 1


def test_kinds_of_gaps_are_few() -> None:
    kinds = {gap_kind(life(BlockFacts(tenant=f"t{i}"), hits=i)) for i in range(10_000)}
    assert len(kinds) <= 32 * 4 * 2


def test_paging_evicts_only_when_full() -> None:
    cache = Paging(2, Lru[str]())
    assert [cache.request(page, 0) for page in "abaca"] == [False, False, True, False, True]
    assert "b" not in cache
