"""Coverage of repeated sampling: with k samples of every task, what share of the tasks has a right one?

Estimators after Chen et al. (arXiv 2107.03374) and Brown et al. (arXiv 2407.21787), and the laws that curves of them
are described by. Plain functions over (samples drawn, samples right) per task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of `samples` drawn without replacement hold at least one of the `right`: unbiased for k tries.

    1 - C(samples - right, k) / C(samples, k), as the product 1 - Π_{i = samples - right + 1}^{samples} (1 - k / i).
    Raises ValueError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not 0 <= right <= samples:
        raise ValueError(f"{right} of {samples} samples cannot be right")
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}: with {samples} samples it must be from 1 to {samples}")
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def coverage(outcomes: Sequence[tuple[int, int]], k: int) -> float:
    """Mean of `pass_at_k` over tasks, each (samples, right)."""
    return fmean(pass_at_k(samples, right, k) for samples, right in outcomes)


def ladder(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to `most`, which ends it: the k that a curve is drawn at."""
    steps = [m * 10**e for e in range(len(str(most))) for m in (1, 2, 5)]
    return [k for k in steps if k < most] + [most]


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """log coverage(k) = a · k^b, with a < 0; b < 0 where more samples help. r2: of the straight line in logarithms."""

    a: float
    b: float
    r2: float

    def coverage(self, k: float) -> float:
        return math.exp(self.a * k**self.b)


def fit_power_law(curve: Sequence[tuple[int, float]]) -> PowerLaw | None:
    """Least squares of log(-log c) = log(-a) + b · log k over the points (k, c), 0 < c < 1; None for fewer than two."""
    points = [(math.log(k), math.log(-math.log(c))) for k, c in curve if 0 < c < 1]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    xx = math.fsum((x - mean_x) ** 2 for x, _ in points)
    xy = math.fsum((x - mean_x) * (y - mean_y) for x, y in points)
    yy = math.fsum((y - mean_y) ** 2 for _, y in points)
    b = xy / xx
    return PowerLaw(-math.exp(mean_y - b * mean_x), b, xy * xy / (xx * yy) if yy else 1.0)


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How the tasks' chances p of one sample being right spread.

    Each task alone is covered as 1 - (1 - p)^k, exponentially; that the mean over tasks follows a power law comes from
    the tasks with small p (arXiv 2502.17578). What more samples would give is therefore read from this, not from the
    curve: tasks that were never solved may have any p below about 3 / samples.
    """

    never: float  # share of tasks that no sample solved
    always: float
    p10: float
    p50: float
    p90: float


def difficulty(outcomes: Sequence[tuple[int, int]]) -> Difficulty:
    """Quantiles (nearest rank) of right / samples over tasks."""
    chances = sorted(right / samples for samples, right in outcomes)
    p10, p50, p90 = (chances[math.ceil(q * len(chances)) - 1] for q in (0.1, 0.5, 0.9))
    return Difficulty(
        never=sum(p == 0 for p in chances) / len(chances),
        always=sum(p == 1 for p in chances) / len(chances),
        p10=p10,
        p50=p50,
        p90=p90,
    )
