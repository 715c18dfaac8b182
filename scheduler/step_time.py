"""How long a step will take: fitted to the steps that were taken.

    T(step) = base + per_tile · ⌈M / tile⌉ + per_context · Σ decode context + per_pair · Σ chunk · (context + chunk / 2)

M are all tokens of the step. The form is that of Sarathi-Serve's budget (arXiv 2403.02310, section 4.3) with the tile
quantisation that it measures. Fitting: steps of like shape share a bucket, which is represented by the median of its
last few, so an outlier moves nothing and what is rarely seen is not forgotten; over the buckets, least squares of the
relative error with coefficients >= 0.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import NamedTuple

BUCKETS = 256  # shapes remembered; fitting all of them takes 2 ms
RING = 8  # steps remembered per shape: their median ignores up to three outliers
REFIT = 64  # steps between fits: 2 ms each is then 0.03 ms a step

# Steps that are longer than predicted by more than the margin are to be one in twenty.
QUANTILE = 0.95
QUANTILE_STEP = 0.01
LEAST_MARGIN, MOST_MARGIN = 1.02, 1.5

ERROR_MEMORY = 0.98  # of the running mean of the relative error: about 50 steps


class StepShape(NamedTuple):
    """What a step's time depends on. A row of one token is a decode; a longer one without guesses is a chunk."""

    num_tokens: int = 0
    decode_context: int = 0  # Σ over decodes of the tokens they attend to
    prefill_work: float = 0.0  # Σ over chunks of tokens · (context before them + tokens / 2)

    def plus(self, start: int, num_tokens: int) -> StepShape:
        """With one more row: the tokens at positions start .. start + num_tokens - 1."""
        tokens, context, work = shape_of([(start, num_tokens)])
        return StepShape(self.num_tokens + tokens, self.decode_context + context, self.prefill_work + work)

    def guessing(self, start: int, nodes: int) -> StepShape:
        """With so many guesses behind the decode of the token at `start`.

        They enter as a chunk does, also where it is one: the decode has read the context already, and every further
        row is only compared with it.
        """
        work = nodes * (start + 1 + nodes / 2)
        return StepShape(self.num_tokens + nodes, self.decode_context, self.prefill_work + work)


def shape_of(rows: Iterable[tuple[int, int]]) -> StepShape:
    """Of a step with these rows, each (start, number of tokens)."""
    tokens = context = 0
    work = 0.0
    for start, num_tokens in rows:
        tokens += num_tokens
        if num_tokens == 1:
            context += start + 1
        else:
            work += num_tokens * (start + num_tokens / 2)
    return StepShape(tokens, context, work)


class StepCost(NamedTuple):
    """The model's coefficients, in seconds; `tile` in tokens."""

    tile: int
    base: float
    per_tile: float
    per_context: float
    per_pair: float

    def seconds(self, shape: StepShape) -> float:
        """Of a step of this shape; nothing to run takes no time."""
        if not shape.num_tokens:
            return 0.0
        tiles = -(-shape.num_tokens // self.tile)
        return (
            self.base
            + self.per_tile * tiles
            + self.per_context * shape.decode_context
            + self.per_pair * shape.prefill_work
        )

    def work_seconds(self, start: int, num_tokens: int) -> float:
        """What tokens start .. start + num_tokens - 1 add to steps that run anyway: the price of serving them."""
        return num_tokens * (self.per_tile / self.tile + self.per_pair * (start + num_tokens / 2))

    def launched(self, num_tokens: int) -> int:
        """Tokens with their padding to whole tiles."""
        return -(-num_tokens // self.tile) * self.tile


def ideal_seconds(cost: StepCost, prompt_tokens: int, output_tokens: int, max_tokens_per_step: int) -> float:
    """Of a request that has the engine for itself: T(p, o) = F(p) + (o - 1) · g(mean context), F being the prompt in
    chunks of at most max_tokens_per_step (Narayanan et al., arXiv 2305.02440)."""
    seconds = 0.0
    for start in range(0, prompt_tokens, max_tokens_per_step):
        seconds += cost.seconds(shape_of([(start, min(max_tokens_per_step, prompt_tokens - start))]))
    decodes = max(0, output_tokens - 1)
    return seconds + decodes * cost.seconds(StepShape(1, prompt_tokens + decodes // 2 + 1))


class StepTimeModel:
    """Learns `cost` from observed steps. `margin`: what measured steps exceed predicted ones by, 19 times in 20."""

    def __init__(self, cost: StepCost) -> None:
        """`cost` is what is believed until enough has been seen; its tile stays."""
        self.cost = cost
        self.error = 0.0  # running mean of |measured / predicted - 1|
        self.margin = LEAST_MARGIN
        self._buckets: OrderedDict[tuple[int, ...], deque[tuple[StepShape, float]]] = OrderedDict()
        self._seen = 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long."""
        if not shape.num_tokens or seconds <= 0:
            return
        ratio = seconds / max(self.cost.seconds(shape), 1e-9)
        self.error = ERROR_MEMORY * self.error + (1 - ERROR_MEMORY) * min(abs(ratio - 1), 1.0)
        above = ratio > self.margin
        self.margin += QUANTILE_STEP * (QUANTILE if above else QUANTILE - 1)
        self.margin = min(max(self.margin, LEAST_MARGIN), MOST_MARGIN)
        key = self._bucket(shape)
        ring = self._buckets.get(key)
        if ring is None:
            ring = self._buckets[key] = deque(maxlen=RING)
            if len(self._buckets) > BUCKETS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        ring.append((shape, seconds))
        self._seen += 1
        if self._seen % REFIT == 0:
            self.fit()

    def fit(self) -> None:
        """Fit to all buckets now."""
        tile = self.cost.tile
        points = []
        for ring in self._buckets.values():
            shapes = [shape for shape, _ in ring]
            features = (
                1.0,
                fmean(-(-shape.num_tokens // tile) for shape in shapes),
                fmean(shape.decode_context for shape in shapes),
                fmean(shape.prefill_work for shape in shapes),
            )
            points.append((features, median(seconds for _, seconds in ring), float(len(ring))))
        fitted = _fit(points)
        if fitted is not None:
            self.cost = StepCost(tile, *fitted)

    def _bucket(self, shape: StepShape) -> tuple[int, ...]:
        tiles = -(-shape.num_tokens // self.cost.tile)
        return (
            tiles if tiles <= 8 else 5 + int(2 * math.log2(tiles)),
            shape.decode_context.bit_length(),
            int(shape.prefill_work).bit_length(),
        )


def _fit(points: Sequence[tuple[tuple[float, ...], float, float]]) -> tuple[float, ...] | None:
    """Coefficients >= 0 that minimise Σ weight · (predicted / seconds - 1)²; points: (features, seconds, weight).

    The best of all subsets of features whose own least squares are positive; of equals the smaller subset, so that what
    was never varied gets no coefficient. None when there is nothing to fit.
    """
    if not points:
        return None
    count = len(points[0][0])
    scale = [max(abs(features[i]) for features, _, _ in points) or 1.0 for i in range(count)]
    gram = [[0.0] * count for _ in range(count)]
    moment = [0.0] * count
    for features, seconds, weight in points:
        row = [feature / s / seconds for feature, s in zip(features, scale, strict=True)]
        for i in range(count):
            moment[i] += weight * row[i]
            for j in range(count):
                gram[i][j] += weight * row[i] * row[j]
    total = sum(weight for _, _, weight in points)
    best: dict[int, float] = {}
    least = total * (1 - 1e-6)
    for size in range(1, count + 1):
        for subset in combinations(range(count), size):
            solution = _solve([[gram[i][j] for j in subset] for i in subset], [moment[i] for i in subset])
            if solution is None or min(solution) < 0:
                continue
            error = total - sum(x * moment[i] for x, i in zip(solution, subset, strict=True))
            if error < least - 1e-6 * total:
                least = error
                best = dict(zip(subset, solution, strict=True))
    return tuple(best.get(i, 0.0) / scale[i] for i in range(count)) if best else None


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gaussian elimination with pivoting; None for a matrix that is singular to working precision."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    largest = max(abs(value) for row in matrix for value in row)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        if abs(rows[pivot][i]) <= 1e-10 * largest:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, size):
            factor = rows[r][i] / rows[i][i]
            for c in range(i, size + 1):
                rows[r][c] -= factor * rows[i][c]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][c] * solution[c] for c in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
