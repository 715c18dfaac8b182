"""The block pool under every eviction order: nothing lost, nothing in use given up, chains given up from their end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.scheduler.block_pool import BlockContent, BlockPool
from quire.scheduler.eviction import Lru
from quire.scheduler.hashing import block_key, root_key
from quire.scheduler.predict import BlockFacts

ORDERS = ["lru", "discard", "phase"]
ROOT = root_key("test")


def contents(tokens: str) -> list[BlockContent]:
    """A chain of blocks of one token each."""
    parent, chain = ROOT, []
    for token in tokens:
        chain.append(BlockContent(block_key(parent, [ord(token)]), parent, (ord(token),)))
        parent = chain[-1].key
    return chain


class Sequence(NamedTuple):
    chain: list[BlockContent]
    blocks: list[int]


def begin(pool: BlockPool, tokens: str, *, shared: bool = True) -> Sequence | None:
    """Hold blocks for `tokens`, the first of them from the cache; None when there is no room."""
    chain, blocks = contents(tokens), []
    for content in chain if shared else []:
        block = pool.find(*content)
        if block is None:
            break
        blocks.append(block)
    for block in blocks:
        pool.share(block)
    fresh = pool.take(len(chain) - len(blocks))
    if fresh is None:
        pool.release(reversed(blocks))
        return None
    return Sequence(chain, blocks + fresh)


def publish(pool: BlockPool, sequence: Sequence, facts: BlockFacts | None = None) -> None:
    for depth, (block, content) in enumerate(zip(sequence.blocks, sequence.chain, strict=True)):
        pool.publish(block, content, (facts or BlockFacts())._replace(depth=depth))


def use(pool: BlockPool, tokens: str, facts: BlockFacts | None = None) -> list[int]:
    """A whole sequence: its blocks, free again."""
    sequence = begin(pool, tokens)
    assert sequence is not None
    publish(pool, sequence, facts)
    pool.release(reversed(sequence.blocks))
    return sequence.blocks


def found(pool: BlockPool, tokens: str) -> str:
    """The beginning of `tokens` that the cache holds."""
    held = ""
    for token, content in zip(tokens, contents(tokens), strict=True):
        if pool.find(*content) is None:
            break
        held += token
    return held


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_without_content_go_first_and_the_cache_from_the_ends(order: str) -> None:
    pool = BlockPool(9, eviction=order)
    use(pool, "abcd")
    taken = pool.take(4)
    assert found(pool, "abcd") == "abcd"
    assert pool.num_evicted == 0
    for rest in ("abc", "ab", "a", ""):
        assert pool.take(1)
        assert found(pool, "abcd") == rest
        assert pool.num_evicted == 4 - len(rest)
    assert pool.take(1) is None
    assert taken is not None
    assert pool.num_used == 8


def test_lru_gives_up_the_least_recently_used() -> None:
    pool = BlockPool(7)
    for tokens in ("ab", "cd", "ef", "ab"):
        use(pool, tokens)
    pool.take(2)
    assert [found(pool, tokens) for tokens in ("ab", "cd", "ef")] == ["ab", "", "ef"]


def test_discard_gives_up_an_answer_before_an_older_prompt() -> None:
    pool = BlockPool(7, eviction="discard")
    use(pool, "abc")
    use(pool, "xyz", BlockFacts(generated=True))
    pool.take(3)
    assert [found(pool, tokens) for tokens in ("abc", "xyz")] == ["abc", ""]


@pytest.mark.parametrize("order", ORDERS)
def test_who_had_a_copy_of_the_start_keeps_the_cached_one_young(order: str) -> None:
    pool = BlockPool(10, eviction=order)
    use(pool, "ab")
    own = begin(pool, "abc", shared=False)  # computed beside the cached "ab", and continues it under its key
    assert own is not None
    use(pool, "x")
    publish(pool, own)
    pool.release(reversed(own.blocks))
    pool.check()
    pool.take(7)
    assert found(pool, "abc") in ("ab", "abc"), "c is of no use without ab"


@pytest.mark.parametrize("order", ORDERS)
def test_what_lost_its_beginning_is_found_again_with_it(order: str) -> None:
    pool = BlockPool(7, eviction=order)
    first = begin(pool, "ab")
    assert first is not None
    publish(pool, first)
    pool.release([first.blocks[1]])
    pool.retract([first.blocks[0]])
    pool.release([first.blocks[0]])
    pool.check()
    assert found(pool, "ab") == ""
    use(pool, "a")
    pool.check()
    assert found(pool, "ab") == "ab"


def test_a_free_block_without_content_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="block 3"):
        BlockPool(5).share(3)


@pytest.mark.parametrize(("arguments", "name"), [((1,), "num_blocks"), ((9, "fifo"), "eviction")])
def test_arguments_that_cannot_work_are_refused_by_name(arguments: tuple[int, str], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        BlockPool(*arguments)


def play(order: str, seed: int, steps: int = 300, blocks: int = 40) -> Iterator[tuple[BlockPool, list[Sequence], int]]:
    """Random traffic with much in common: the pool after each step, who holds what, and the blocks found so far."""
    draw, pool, running, hits = random.Random(seed), BlockPool(blocks, eviction=order, seed=seed), [], 0
    for _ in range(steps):
        pool.now += draw.expovariate(1.0)
        if running and draw.random() < 0.5:
            ended = running.pop(draw.randrange(len(running)))
            if draw.random() < 0.1:
                pool.retract(ended.blocks)
            pool.release(reversed(ended.blocks))
        else:
            tokens = "".join(draw.choice("ab") for _ in range(draw.randint(1, 12)))
            free = pool.num_free
            sequence = begin(pool, tokens, shared=draw.random() < 0.9)
            if sequence is None:
                assert pool.num_free == free, "a refusal changes nothing"
            else:
                hits += len(found(pool, tokens))
                facts = BlockFacts(0, draw.random() < 0.5, draw.random() < 0.2, draw.choice("xy"), draw.random() < 0.3)
                publish(pool, sequence, facts)
                running.append(sequence)
        yield pool, running, hits


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.sampled_from(ORDERS))
def test_every_block_is_accounted_for(seed: int, order: str) -> None:
    for pool, running, _ in play(order, seed, steps=80):
        pool.check(sequence.blocks for sequence in running)


class Recorder:
    """Stands between pool and order: a block is given up neither in use nor before what continues it."""

    def __init__(self, pool: BlockPool) -> None:
        self.wrong: list[str] = []
        give_up = pool._give_up

        def watched() -> int:
            before = [content.key if content else None for content in pool._content]
            block = give_up()
            if pool._refs[block]:
                self.wrong.append(f"block {block} is in use")
            for other, content in enumerate(pool._content):
                if content is not None and content.parent == before[block] and pool._refs[other] == 0:
                    self.wrong.append(f"block {other} still continues {block}")
            return block

        pool._give_up = watched  # type: ignore[method-assign]


def wrongs(order: str, seed: int) -> list[str]:
    recorder = None
    for pool, _, _ in play(order, seed):
        recorder = recorder or Recorder(pool)
    assert recorder is not None
    return recorder.wrong


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_is_given_up_in_use_or_before_what_continues_it(order: str) -> None:
    assert not [wrong for seed in range(20) for wrong in wrongs(order, seed)]


def test_the_recorder_tells_an_order_that_starts_at_the_wrong_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def newest(self: Lru[int]) -> int:
        page = next(reversed(self._pages))
        self.remove(page)
        return page

    monkeypatch.setattr(Lru, "victim", newest)
    assert [wrong for seed in range(5) for wrong in wrongs("lru", seed)]


@pytest.mark.parametrize("order", ORDERS)
def test_a_seed_decides_everything(order: str) -> None:
    first, second = ([[sequence.blocks for sequence in running] for _, running, _ in play(order, 7)] for _ in range(2))
    assert first == second


def test_check_tells_a_lost_block() -> None:
    pool = BlockPool(5)
    blocks = pool.take(2)
    with pytest.raises(RuntimeError, match="references"):
        pool.check()
    assert blocks is not None
    pool.check([blocks])
