"""What the pool remembers in order to predict has a fixed size, and predictions that lose are not followed."""

from __future__ import annotations

import random

import pytest

from quire.scheduler.block_pool import BlockContent, BlockPool
from quire.scheduler.foresight import MAX_SAMPLING, SAMPLED_BLOCKS, Residence, sampling
from quire.scheduler.ghost import Guard
from quire.scheduler.hashing import block_key, root_key
from quire.scheduler.predict import BlockFacts, Features, Life, Predictor

ROOT = root_key("test")


def request(pool: BlockPool, number: int, facts: BlockFacts) -> bool:
    """Use a block of its own; whether it was there."""
    content = BlockContent(block_key(ROOT, [number]), ROOT, (number,))
    block = pool.find(*content)
    if block is not None:
        pool.share(block)
        pool.release([block])
        return True
    taken = pool.take(1)
    assert taken is not None
    pool.publish(taken[0], content, facts)
    pool.release(taken)
    return False


def test_a_share_of_a_large_pool_is_sampled_and_all_of_a_small_one() -> None:
    assert sampling(SAMPLED_BLOCKS) == 1
    assert sampling(8 * SAMPLED_BLOCKS) == 8
    assert sampling(10**6) == MAX_SAMPLING


def test_memory_does_not_grow_with_the_traffic() -> None:
    pool = BlockPool(17, eviction="discard")
    foresight = pool._foresight
    assert foresight is not None
    for i in range(5000):
        pool.now += 1.0
        request(pool, i, BlockFacts(tenant=f"tenant {i}"))
    assert len(foresight._waits) <= foresight._belady.reach + 1
    assert len(foresight._predictor.gaps._counts) <= 32 * 4 * 2
    assert len(foresight._residence._times) <= 2 * Residence.MARKS


def test_the_horizon_is_the_time_in_which_as_many_blocks_were_allocated() -> None:
    residence = Residence(128)
    assert residence.seconds(100, 0.0) == float("inf")
    for second in range(400):
        residence.taken(1, float(second))
    assert abs(residence.seconds(100, 400.0) - 100) <= 4


def wrong_bit(predictor: Predictor, life: Life, x: Features) -> int:
    """Discard what came back, keep half of what does not."""
    return int(life.hits > 0 or not life.facts.generated)


def hits(eviction: str, uses: list[int]) -> int:
    pool = BlockPool(65, eviction=eviction)
    count = 0
    for number in uses:
        pool.now += 1.0
        count += request(pool, number, BlockFacts(generated=number % 2 == 0))
    return count


def returning(rounds: int) -> list[int]:
    """Ten numbers that come back in turn, each time after ten new ones."""
    fresh = iter(range(1000, 10**6))
    return [i % 20 if i % 2 else next(fresh) for i in range(rounds)]


def test_bits_that_are_all_wrong_cost_little_once_seen_through(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = returning(8000)
    monkeypatch.setattr(Predictor, "bit", wrong_bit)
    assert hits("discard", uses) >= 0.97 * hits("lru", uses)


def test_without_the_guard_they_would_cost_much(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = returning(8000)
    monkeypatch.setattr(Predictor, "bit", wrong_bit)
    monkeypatch.setattr(Guard, "request", lambda self, key, bit, *, again: None)
    assert hits("discard", uses) < 0.9 * hits("lru", uses)


def test_what_is_learned_outdoes_lru_on_a_scan_through_what_is_wanted() -> None:
    """A third of the uses are of 48 blocks, which LRU loses to the blocks that nobody wants again."""
    draw = random.Random(0)
    uses = [draw.randrange(48) if i % 3 == 0 else 1000 + i for i in range(12_000)]
    assert hits("discard", uses) > 1.5 * hits("lru", uses)
