"""How fast something grows, from noisy points: the median of the slopes of all pairs (Theil 1950, Sen 1968).

A few steps that are much too high or low, such as an allocator's, do not move it; a straight line through all would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

Z95 = 1.96


class Slope(NamedTuple):
    """value, and an interval that would hold it 95 times of 100 if the points' errors were independent."""

    value: float
    low: float
    high: float


def theil_sen(points: Sequence[tuple[float, float]]) -> Slope:
    """Of (x, y) with different x. Raises ValueError for fewer than three."""
    if len(points) < 3:
        raise ValueError("a slope needs three points at least")
    slopes = sorted((y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in combinations(points, 2))
    n, m = len(points), len(slopes)
    # Kendall's S has this variance where nothing grows; its ranks cut the sorted slopes (Sen 1968, section 6).
    c = Z95 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = slopes[max(0, math.floor((m - c) / 2))]
    high = slopes[min(m - 1, math.ceil((m + c) / 2))]
    middle = slopes[m // 2] if m % 2 else (slopes[m // 2 - 1] + slopes[m // 2]) / 2
    return Slope(middle, low, high)
