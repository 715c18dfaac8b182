"""How likely a guess is accepted, level by level: of one request, and of everything that its method guessed.

    rate(level) = P(accepted | guessed there, and reached)      P(a level is reached) = product of the rates above it

Both are means over the latest trials. A request that has few of its own is believed to be like the others of its
method, and a level that was rarely reached to be like the one above it.
"""

from __future__ import annotations

# Before anything was tried. What is too high is corrected by the first few steps, while what is too low would have to
# wait for a probe.
FIRST_BELIEF = 0.7

# Trials that a belief weighs: after four of its own a request is half itself.
BELIEF_WEIGHT = 4.0

# Of a request the last ten trials count: text changes its kind every few lines. Of a method the last 500, which are
# those of a second or two under load.
REQUEST_MEMORY = 0.9
METHOD_MEMORY = 0.998


class Trials:
    """Decayed counts by level."""

    __slots__ = ("accepted", "memory", "tried")

    def __init__(self, depth: int, memory: float) -> None:
        self.memory = memory
        self.tried = [0.0] * depth
        self.accepted = [0.0] * depth

    def learn(self, accepted: int, depth: int) -> None:
        """`depth` levels were guessed; the first `accepted` were right, and the next, if there was one, was wrong."""
        for level in range(min(accepted + 1, depth)):
            self.tried[level] = self.tried[level] * self.memory + 1
            self.accepted[level] = self.accepted[level] * self.memory + (level < accepted)


def method_rates(trials: Trials) -> list[float]:
    """By level, of all that a method guessed."""
    rates = []
    belief = FIRST_BELIEF
    for tried, accepted in zip(trials.tried, trials.accepted, strict=True):
        belief = (accepted + BELIEF_WEIGHT * belief) / (tried + BELIEF_WEIGHT)
        rates.append(belief)
    return rates
