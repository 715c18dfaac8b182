"""What guessing costs: learned from the steps that guessed.

    seconds of a step = what the step-time model says of its rows      step_time.py
                      + fixed + per_node · nodes        what that leaves out: masks, compaction, no overlap
                      + per_level · levels + per_row · rows      of each method that guessed, before the step's pass

The step-time model itself learns from steps without guesses only. What a step would take without them is then always
known, and cannot be taken for larger because all steps have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from .drafts import DraftOrder
from .plan import DraftPass

# The last 50 steps count: two or three seconds of a stream.
MEMORY = 0.98

# So much is added to the second term's moment: steps that cannot tell the two apart say that the first is all. More of
# the second is then believed to be free, and the first step that has more of it corrects that, where the opposite error
# would keep such steps from being taken.
RIDGE = 1e-4

# Whatever took longer than so many times what was predicted was held up by something else.
OUTLIER = 4.0


class TwoTerms:
    """seconds = a · x + b · y with a, b >= 0, by least squares over the latest observations."""

    __slots__ = ("_moments", "a", "b")

    def __init__(self) -> None:
        self.a = self.b = 0.0
        self._moments: tuple[float, ...] = (0.0,) * 5

    def observe(self, x: float, y: float, seconds: float) -> None:
        new = (x * x, x * y, y * y, x * seconds, y * seconds)
        xx, xy, yy, xs, ys = self._moments = tuple(
            MEMORY * old + add for old, add in zip(self._moments, new, strict=True)
        )
        ry = yy * (1 + RIDGE)
        det = xx * ry - xy * xy
        a, b = (xs * ry - ys * xy, ys * xx - xs * xy) if det > 0 else (0.0, 0.0)
        if a >= 0 and b >= 0 and det > 0:
            self.a, self.b = a / det, b / det
        elif a >= b:
            self.a, self.b = max(xs / xx, 0.0) if xx else 0.0, 0.0
        else:
            self.a, self.b = 0.0, max(ys / ry, 0.0) if ry else 0.0


class DraftCost:
    def __init__(self) -> None:
        self.verifying = TwoTerms()  # of one step, and of a node
        self.guessing: dict[str, TwoTerms] = {}  # method -> of a level, and of a row of the proposer
        self._times: dict[str, int] = {}  # how often what was done

    def of(self, method: str) -> TwoTerms:
        """Of a level, and of a row; nothing is known to cost nothing until it has been seen."""
        return self.guessing.setdefault(method, TwoTerms())

    def verified(self, nodes: int, predicted: float, seconds: float) -> None:
        """A step with so many nodes took `seconds` besides guessing; by its rows alone it was predicted otherwise."""
        if self._is_first("verify"):
            return
        self.verifying.observe(1.0, nodes, min(seconds, OUTLIER * predicted) - predicted)

    def guessed(self, done: DraftPass, streams: int) -> None:
        """What a proposer did for so many streams."""
        if self._is_first(done.method):
            return
        levels, rows = (done.levels, done.rows) if done.levels else (1, streams)
        terms = self.of(done.method)
        predicted = terms.a * levels + terms.b * rows
        terms.observe(levels, rows, min(done.seconds, OUTLIER * predicted) if predicted else done.seconds)

    def is_known(self, method: str) -> bool:
        return self._times.get(method, 0) > 1

    def _is_first(self, what: str) -> bool:
        """Whether this is done for the first time, which pays for memory and compilation and says nothing."""
        times = self._times[what] = self._times.get(what, 0) + 1
        return times == 1

    def seconds(self, orders: Sequence[DraftOrder]) -> float:
        """What these add to a step, beside their rows of the target."""
        if not orders:
            return 0.0
        guessing: dict[str, tuple[int, int]] = {}
        for order in orders:
            levels, rows = guessing.get(order.method, (0, 0))
            depth = order.shape.depth
            guessing[order.method] = max(levels, num_passes(order.method, depth)), rows + sum(rows_by_level(order))
        nodes = sum(order.shape.nodes for order in orders)
        seconds = self.verifying.a + self.verifying.b * nodes
        for method, (levels, rows) in guessing.items():
            seconds += self.of(method).a * levels + self.of(method).b * rows
        return seconds


def num_passes(method: str, depth: int) -> int:
    """Of the proposer, for so many levels: a look-up is one for all of them."""
    return min(depth, 1) if method == "ngram" else depth


@lru_cache(maxsize=256)
def nodes_by_level(order: DraftOrder) -> tuple[int, ...]:
    """Rows of the target."""
    shape = order.shape
    return tuple(shape.cut(i + 1).nodes - shape.cut(i).nodes for i in range(shape.depth))


@lru_cache(maxsize=256)
def rows_by_level(order: DraftOrder) -> tuple[int, ...]:
    """Rows of the proposer. A chain computes one at each level; a tree the root and all nodes so far, anew."""
    depth = order.shape.depth
    if order.method == "ngram":
        return (1, *[0] * (depth - 1))
    if order.shape.kind == "chain":
        return (1,) * depth
    return tuple(1 + order.shape.cut(i).nodes for i in range(depth))
