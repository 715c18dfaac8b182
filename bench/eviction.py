"""Which eviction keeps the blocks that are wanted again: traces replayed through the real block pool.

    sessions.py ──▶ requests as chains of keys ──▶ replay() through a BlockPool of each order ──▶ hit tokens

Hit tokens are prompt tokens found in the cache when a request is admitted. `belady` knows the trace: it gives up the
block whose next use is farthest, and of equals the end of a chain first.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, count
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..scheduler.block_pool import BlockContent, BlockPool
from ..scheduler.hashing import block_key, root_key
from ..scheduler.predict import BlockFacts
from .sessions import SessionConfig, TraceRequest, adversarial, multi_turn, scan

ORDERS = ("lru", "discard", "phase", "belady")


@dataclass(frozen=True, kw_only=True)
class EvictionConfig:
    fractions: tuple[float, ...] = (0.1, 0.3, 0.6)  # of the blocks of a trace's working set that the cache holds
    block_size: int = 16
    decode_seconds: float = 0.02  # a token; a request holds its blocks so long
    seed: int = 0
    sessions: SessionConfig = field(default_factory=SessionConfig)


class Chain(NamedTuple):
    """One sample of a request: its prompt and output as full blocks."""

    contents: list[BlockContent]
    facts: list[BlockFacts]
    blocks: int  # with the last one, if it is not full


class Job(NamedTuple):
    """A request as the pool sees it."""

    time: float  # [s]
    seconds: float  # that it holds its blocks
    match: int  # leading blocks that it may find in the cache: all full ones before the last prompt token
    prompt_blocks: int  # full ones
    chains: list[Chain]


def jobs_of(trace: Sequence[TraceRequest], config: EvictionConfig) -> list[Job]:
    size, root = config.block_size, root_key("trace")
    known: dict[tuple[bytes, tuple[int, ...]], BlockContent] = {}

    def contents(token_ids: tuple[int, ...]) -> list[BlockContent]:
        parent, found = root, []
        for start in range(0, len(token_ids) - size + 1, size):
            tokens = token_ids[start : start + size]
            content = known.get((parent, tokens))
            if content is None:
                content = known[parent, tokens] = BlockContent(block_key(parent, tokens), parent, tokens)
            found.append(content)
            parent = content.key
        return found

    jobs = []
    for request in trace:
        full = len(request.prompt) // size
        samples = []
        for output in request.outputs:
            made = contents(request.prompt + output[:-1])  # the K/V of the last token is never computed
            facts = [
                BlockFacts(i, i >= full, i >= full and request.n > 1, request.tenant, False) for i in range(len(made))
            ]
            samples.append(Chain(made, facts, -(-(len(request.prompt) + len(output)) // size)))
        seconds = config.decode_seconds * max(map(len, request.outputs))
        jobs.append(Job(request.time, seconds, (len(request.prompt) - 1) // size, full, samples))
    return jobs


def replay(jobs: Sequence[Job], pool: BlockPool) -> int:
    """Blocks found in the cache. A request that finds no room waits for the ones before it to end."""
    ends: list[tuple[float, int, list[tuple[Chain, list[int]]], bool]] = []  # a heap: time, number, held, in a session
    waiting: deque[Job] = deque()
    generated: set[bytes] = set()
    numbers = count()
    hits = 0

    def publish(job_chain: Chain, blocks: list[int], start: int, stop: int, session: bool) -> None:
        for i in range(start, stop):
            pool.publish(blocks[i], job_chain.contents[i], job_chain.facts[i]._replace(session_turn=session))

    def admit(number: int, job: Job) -> bool:
        nonlocal hits
        first = job.chains[0]
        found: list[int] = []
        for content in first.contents[: job.match]:
            block = pool.find(*content)
            if block is None:
                break
            found.append(block)
        for block in found:
            pool.share(block)
        session = any(content.key in generated for content in first.contents[: len(found)])
        fresh = pool.take(first.blocks - len(found) + sum(c.blocks - job.prompt_blocks for c in job.chains[1:]))
        if fresh is None:
            pool.release(reversed(found))
            return False
        blocks = found + fresh[: first.blocks - len(found)]
        rest = fresh[len(blocks) - len(found) :]
        publish(first, blocks, len(found), job.prompt_blocks, session)
        held = [(first, blocks)]
        for chain in job.chains[1:]:
            own, rest = rest[: chain.blocks - job.prompt_blocks], rest[chain.blocks - job.prompt_blocks :]
            for block in blocks[: job.prompt_blocks]:
                pool.share(block)
            held.append((chain, blocks[: job.prompt_blocks] + own))
        hits += len(found)
        heapq.heappush(ends, (pool.now + job.seconds, number, held, session))
        return True

    def end() -> None:
        pool.now, _, held, session = heapq.heappop(ends)
        for chain, blocks in held:
            prompt = next((i for i, facts in enumerate(chain.facts) if facts.generated), len(chain.facts))
            publish(chain, blocks, prompt, len(chain.contents), session)
            generated.update(content.key for content in chain.contents[prompt:])
            pool.release(reversed(blocks))

    def admit_waiting() -> None:
        while waiting and admit(next(numbers), waiting[0]):
            waiting.popleft()

    for job in jobs:
        while ends and ends[0][0] <= job.time:
            end()
            admit_waiting()
        pool.now = job.time
        waiting.append(job)
        admit_waiting()
        if waiting and not ends:
            raise ValueError(f"a request of {job.chains[0].blocks} blocks does not fit a cache of {pool.num_blocks}")
    while ends:
        end()
        admit_waiting()
    return hits


class Farthest:
    """The order of Belady's optimum: the block whose key is used again last, then the one released first."""

    def __init__(self, pool: BlockPool, uses: dict[bytes, list[float]]) -> None:
        self._pool, self._uses = pool, uses
        self._heap: list[tuple[float, int, int]] = []  # (-time of the next use, serial, block)
        self._serial: dict[int, int] = {}  # of the blocks that may be given up
        self._count = 0

    def __len__(self) -> int:
        return len(self._serial)

    def add(self, page: int, bit: int, *, covered: bool = False) -> None:
        content = self._pool._content[page]
        times = self._uses.get(content.key, []) if content else []
        place = bisect_right(times, self._pool.now)
        self._count += 1
        self._serial[page] = self._count
        heapq.heappush(self._heap, (-times[place] if place < len(times) else -math.inf, self._count, page))

    def remove(self, page: int) -> None:
        del self._serial[page]

    def touch(self, page: int) -> None:
        self.remove(page)
        self.add(page, 0)

    def cover(self, page: int) -> None:
        pass

    def uncover(self, page: int) -> None:
        pass

    def predict(self, page: int, bit: int) -> None:
        pass

    def victim(self) -> int:
        while True:
            _, serial, page = heapq.heappop(self._heap)
            if self._serial.get(page) == serial:
                del self._serial[page]
                return page

    oldest = victim

    def check(self, covered: dict[int, bool]) -> None:
        if self._serial.keys() != covered.keys():
            raise RuntimeError("the offline order lost blocks")


class OfflinePool(BlockPool):
    """A pool that knows when each key will be looked for."""

    def __init__(self, num_blocks: int, uses: dict[bytes, list[float]]) -> None:
        super().__init__(num_blocks)
        self._order = Farthest(self, uses)


def _uses(jobs: Sequence[Job]) -> dict[bytes, list[float]]:
    uses: dict[bytes, list[float]] = {}
    for job in jobs:
        for content in job.chains[0].contents[: job.match]:
            uses.setdefault(content.key, []).append(job.time)
    return uses


def working_set(jobs: Sequence[Job]) -> int:
    """Blocks: the most at any time that are held, or were used and will be again. A cache of so many loses nothing."""
    first: dict[bytes, float] = {}
    last: dict[bytes, float] = {}
    for job in jobs:
        for chain in job.chains:
            for content in chain.contents:
                first.setdefault(content.key, job.time)
                last[content.key] = max(last.get(content.key, 0.0), job.time + job.seconds)
    changes = sorted([*((time, 1) for time in first.values()), *((time, -1) for time in last.values())])
    return max(accumulate((change for _, change in changes), initial=0))


def hit_tokens(jobs: Sequence[Job], num_blocks: int, config: EvictionConfig) -> dict[str, int]:
    """Prompt tokens found in a cache of `num_blocks` blocks, by order."""
    found = {}
    for order in ORDERS:
        if order == "belady":
            pool: BlockPool = OfflinePool(num_blocks + 1, _uses(jobs))
        else:
            pool = BlockPool(num_blocks + 1, eviction=order, seed=config.seed)
        found[order] = config.block_size * replay(jobs, pool)
        pool.check()
    return found


def run(config: EvictionConfig) -> dict[str, Any]:
    """{"settings", "rows": [{"trace", "seed", "cache_fraction", "cache_blocks", "hit_tokens": {order: tokens}}]}.

    A row's cache is a fraction of the working set of `multi_turn`; the other two traces are made against that cache.
    """
    talk = jobs_of(multi_turn(config.sessions, config.seed), config)
    needed = working_set(talk)
    rows = []
    for fraction in config.fractions:
        blocks = max(int(fraction * needed), *(sum(chain.blocks for chain in job.chains) for job in talk))
        made = {
            "multi_turn": talk,
            "adversarial": jobs_of(adversarial(blocks, config.block_size, config.seed), config),
            "scan": jobs_of(scan(blocks, config.block_size, config.seed), config),
        }
        for name, jobs in made.items():
            rows.append(
                {
                    "trace": name,
                    "seed": config.seed,
                    "cache_fraction": fraction,
                    "cache_blocks": blocks,
                    "hit_tokens": hit_tokens(jobs, blocks, config),
                }
            )
    return {"settings": asdict(config), "rows": rows}


def table(result: dict[str, Any]) -> Table:
    """Hit tokens in thousands; of the predicted orders also the share of the gap from LRU to Belady that they close."""
    shown = Table(
        "trace",
        "cache",
        "blocks",
        *ORDERS,
        *(f"gap: {order}" for order in ("discard", "phase")),
        title="hit tokens by eviction order, thousands",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in result["rows"]:
        hits = row["hit_tokens"]
        shown.add_row(
            row["trace"],
            f"{row['cache_fraction']:.0%}",
            str(row["cache_blocks"]),
            *(f"{hits[order] / 1e3:.1f}" for order in ORDERS),
            *(_closed(hits, order) for order in ("discard", "phase")),
        )
    return shown


def _closed(hits: dict[str, int], order: str) -> str:
    gap = hits["belady"] - hits["lru"]
    return f"{(hits[order] - hits['lru']) / gap:.0%}" if gap else "-"
