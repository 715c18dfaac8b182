"""One bit for a block that nobody holds: 1 = it will not be wanted before its place is, discard; 0 = keep.

    structural   by what the block is: a sample's own tokens, an answer, a prefix of many
    gap          by how soon the blocks of this tenant were wanted again, and for how long this one has not been
    learned      logistic regression on both and on all that is known, trained on what the optimum would have kept

The learned bit decides once it has seen enough; before it the gap bit; before that the structural one (Paging with
Succinct Predictions asks for the decision, not for the time of the next use). Everything here has a fixed size.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from operator import mul
from typing import NamedTuple

TENANTS = 32  # hash buckets: what is remembered by tenant must not grow with their number

# Keep what is wanted in time with more than this chance. Behind the discards stands LRU, so a doubtful block is better
# left to it: of the gap to the optimum 0.3 closed 29 %, 0.2 and 0.1 32 % (`quire bench eviction`, multi_turn at 0.3).
THETA = 0.2
DISCARD_SCORE = math.log((1 - THETA) / THETA)  # the same, as the log odds of "discard"

DENSE = 17  # numbers in Features.dense


class BlockFacts(NamedTuple):
    """What the scheduler knows of a block that it publishes.

    depth         index in its sequence
    generated     holds output tokens
    sample        of one of n > 1 samples, behind the prompt that they share
    tenant        whom it was computed for
    session_turn  the request looks like a conversation: its prompt hit blocks that hold output tokens
    """

    depth: int = 0
    generated: bool = False
    sample: bool = False
    tenant: str = ""
    session_turn: bool = False


@dataclass(slots=True, eq=False)
class Life:
    """What has become of a block since it was published. Times in seconds."""

    facts: BlockFacts
    born: float
    used: float  # when its last use began
    released: float  # when the last holder left it
    hits: int = 0  # times it was found while nobody held it
    children: int = 0  # blocks that continued it, siblings among n samples aside
    orphan: bool = False  # the block before it is gone, so that nobody finds it
    bucket: int = field(init=False)

    def __post_init__(self) -> None:
        self.bucket = zlib.crc32(self.facts.tenant.encode("utf-8", "surrogatepass")) % TENANTS

    @property
    def in_session(self) -> bool:
        return self.facts.session_turn or (self.facts.generated and self.hits > 0)


def structural_bit(life: Life) -> int | None:
    """What the block's nature says; None when that is nothing."""
    if life.orphan:
        return 1
    if life.children >= 2 or life.hits >= 2 or life.in_session:
        return 0
    if life.facts.sample or life.facts.generated:
        return 1
    return None


class GapKind(NamedTuple):
    """Blocks whose gaps are counted together."""

    bucket: int
    hits: int  # 0, 1, 2, or 3 for more: who came back twice comes back again
    sample: bool


def gap_kind(life: Life) -> GapKind:
    return GapKind(life.bucket, min(life.hits, 3), life.facts.sample)


class Gaps:
    """How long blocks of each kind waited to be wanted again: histograms over half octaves of seconds.

    The last bin counts the blocks that were not wanted within the memory of who observes.
    """

    FIRST = 2.0**-6  # seconds; shorter gaps are in the first bin
    BINS = 48  # half octaves: up to 2**18 s, three days
    ENOUGH = 16  # observations before a probability is more than a guess
    MEMORY = 1024  # observations after which all counts are halved: the older ones fade

    def __init__(self) -> None:
        self._counts: dict[GapKind, list[float]] = {}

    def _bin(self, seconds: float) -> int:
        if seconds == math.inf:
            return self.BINS
        return min(self.BINS - 1, max(0, int(2 * math.log2(max(seconds, self.FIRST) / self.FIRST))))

    def observe(self, kind: GapKind, seconds: float) -> None:
        """A gap between two uses; inf = not used again."""
        counts = self._counts.setdefault(kind, [0.0] * (self.BINS + 1))
        counts[self._bin(seconds)] += 1
        if sum(counts) > self.MEMORY:
            counts[:] = [count / 2 for count in counts]

    def probability(self, kind: GapKind, idle: float, horizon: float) -> float | None:
        """P(wanted within `horizon` seconds from now | unused for `idle` seconds); None before enough was seen."""
        counts = self._counts.get(kind)
        if counts is None or sum(counts) < self.ENOUGH:
            return None
        start, stop = self._bin(idle) if idle > 0 else 0, self._bin(idle + horizon)
        later = sum(counts[start:])
        return sum(counts[start : stop + 1 if stop < self.BINS else stop]) / later if later else 0.0


class Features(NamedTuple):
    """What the regression sees of a block."""

    dense: tuple[float, ...]
    tenant: int  # index of the one tenant feature that is 1


def features(life: Life, idle: float, horizon: float, wanted: float | None) -> Features:
    """What is known of a block that is unused for `idle` seconds; all within about [-1, 1]. `wanted`: by its gaps."""
    facts, structural = life.facts, structural_bit(life)
    return Features(
        (
            1.0,
            float(facts.generated),
            float(facts.sample),
            float(life.in_session),
            float(life.hits == 0),
            float(life.hits == 1),
            float(life.hits == 2),
            float(life.hits > 2),
            float(life.children == 0),
            float(life.children > 1),
            math.log2(1 + facts.depth) / 10,
            math.log2(1 + idle) / 10,
            min(idle / horizon, 4.0) / 4 if horizon > 0 else 1.0,
            math.log2(1 + life.released - life.born) / 10,
            0.0 if structural is None else 2.0 * structural - 1,
            0.0 if wanted is None else 1 - 2 * wanted,
            0.0 if wanted is None else (1.0 if wanted <= THETA else -1.0),
        ),
        2 * life.bucket + (life.hits > 0),
    )


class Logistic:
    """P(discard) by logistic regression, trained one example at a time (AdaGrad, Duchi et al., JMLR 2011)."""

    ENOUGH = 256  # examples before its word counts
    RATE = 0.2

    def __init__(self) -> None:
        self.examples = 0
        self._weights = [0.0] * DENSE
        self._squares = [1e-2] * DENSE
        self._tenant_weights = [0.0] * (2 * TENANTS)
        self._tenant_squares = [1e-2] * (2 * TENANTS)

    def score(self, x: Features) -> float:
        """The log odds of "discard"."""
        return math.fsum(map(mul, self._weights, x.dense)) + self._tenant_weights[x.tenant]

    def train(self, x: Features, bit: int) -> None:
        """Learn that `bit` would have been right."""
        self.examples += 1
        error = 1 / (1 + math.exp(-max(-30.0, min(30.0, self.score(x))))) - bit
        weights, squares = self._weights, self._squares
        for i, value in enumerate(x.dense):
            if value:
                slope = error * value
                squares[i] += slope * slope
                weights[i] -= self.RATE * slope / math.sqrt(squares[i])
        self._tenant_squares[x.tenant] += error * error
        self._tenant_weights[x.tenant] -= self.RATE * error / math.sqrt(self._tenant_squares[x.tenant])


class Predictor:
    """The three together."""

    def __init__(self) -> None:
        self.gaps = Gaps()
        self.learned = Logistic()

    def look(self, life: Life, now: float, horizon: float) -> Features:
        """What is known of a free block `now`, if its place is needed in about `horizon` seconds."""
        idle = max(0.0, now - life.released)
        return features(life, idle, horizon, self.gaps.probability(gap_kind(life), idle, horizon))

    def bit(self, life: Life, x: Features) -> int:
        """1 = discard."""
        if life.orphan:
            return 1
        if self.learned.examples >= Logistic.ENOUGH:
            return int(self.learned.score(x) > DISCARD_SCORE)
        wanted = x.dense[-1]
        if wanted:
            return int(wanted > 0)
        return structural_bit(life) or 0
