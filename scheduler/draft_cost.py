"""What guessing costs: learned from the steps that guessed.

    seconds of a step = what the step-time model says of its rows      step_time.py
                      + fixed + per_node · nodes        what that leaves out: masks, compaction, no overlap
                      + per_level · levels + per_row · rows      of each method that guessed, before the step's pass
                      + per_missed · rows               of what its proposer had to catch up with

The step-time model itself learns from steps without guesses only. What a step would take without them is then always
known, and cannot be taken for larger because all steps have them. When it learns, what was seen of steps with guesses
is judged anew.

All fits are to the relative error. A machine that is held up makes steps longer and never shorter, and one that took
ten times as long weighs a hundredth: the first few steps may all be such ones, and must not be believed for long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache

from .drafts import DraftOrder
from .plan import DraftPass
from .step_time import StepCost, StepShape

# The last 50 steps count: two or three seconds of a stream.
MEMORY = 0.98
REMEMBERED = 50

# So much is added to the second term's moment: steps that cannot tell the two apart say that the first is all. More of
# the second is then believed to be free, and the first step that has more of it corrects that, where the opposite error
# would keep such steps from being taken.
RIDGE = 1e-4


class TwoTerms:
    """seconds = a · x + b · y with a, b >= 0, by least squares over the latest observations."""

    __slots__ = ("_moments", "a", "b")

    def __init__(self) -> None:
        self.a = self.b = 0.0
        self._moments: tuple[float, ...] = (0.0,) * 5

    def observe(self, x: float, y: float, seconds: float, whole: float) -> None:
        """whole: seconds of all that was measured, of which these are a part; errors count relative to them."""
        x, y, seconds = x / whole, y / whole, seconds / whole
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
        self.missed: dict[str, TwoTerms] = {}  # method -> of a row that its proposer catches up with; one term
        self._times: dict[str, int] = {}  # how often what was done
        self._verified: deque[tuple[StepShape, int, float]] = deque(maxlen=REMEMBERED)

    def of(self, method: str) -> TwoTerms:
        """Of a level, and of a row; nothing is known to cost nothing until it has been seen."""
        return self.guessing.setdefault(method, TwoTerms())

    def verified(self, shape: StepShape, nodes: int, seconds: float, cost: StepCost) -> None:
        """A step of this shape with so many nodes took `seconds` besides guessing; `cost` knows of its rows alone."""
        if self._is_first("verify") or seconds <= 0:
            return
        self._verified.append((shape, nodes, seconds))
        self._judge(shape, nodes, seconds, cost)

    def judge_anew(self, cost: StepCost) -> None:
        """The step-time model has learned: what it left out of the steps that were seen is something else now."""
        self.verifying = TwoTerms()
        for shape, nodes, seconds in self._verified:
            self._judge(shape, nodes, seconds, cost)

    def _judge(self, shape: StepShape, nodes: int, seconds: float, cost: StepCost) -> None:
        predicted = cost.seconds(shape)
        # A step that was faster than predicted by chance weighs no more than one that was slower.
        self.verifying.observe(1.0, nodes, seconds - predicted, max(seconds, predicted))

    def guessed(self, done: DraftPass, streams: int) -> float:
        """What a proposer did for so many streams. Returns seconds of it that catching up is believed to have taken."""
        if done.seconds <= 0:
            return 0.0
        levels, rows = (done.levels, done.rows - done.caught_up) if done.levels else (1, streams)
        terms = self.of(done.method)
        if done.caught_up <= rows:
            # What was accepted of trees is missing in every step: a part of what a level costs.
            if not self._is_first(done.method):
                terms.observe(levels, rows, done.seconds, done.seconds)
            return 0.0
        missed = self.missed.setdefault(done.method, TwoTerms())
        missed.observe(done.caught_up, 0.0, done.seconds - terms.a * levels - terms.b * rows, done.seconds)
        return missed.a * done.caught_up

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
