"""What a step has left for prompts: tokens, and seconds where a latency was promised.

Sarathi-Serve's token budget (arXiv 2403.02310, section 4.3), chosen anew in every step: the largest chunk whose step is
predicted to keep the promise, given what decodes in it. Long contexts make chunks short, few streams make them long.
"""

from __future__ import annotations

import math

from .step_time import StepCost, StepShape

# A chunk that was cut ends on a block boundary if that gives up at most this share of it: the block can then be shared
# one step sooner. More would cost throughput for everybody.
BLOCK_END = 1 / 8

# Seconds that a step beside streams may take where nobody said otherwise. On two cores and a model of 0.4 B parameters
# such steps take in 132 tokens at the beginning of a prompt of 2,000 and 40 at its end, and no stream of four waited
# 0.1 s for it (docs/performance.md).
UNPROMISED = 0.08


class Budget:
    def __init__(self, cost: StepCost, shape: StepShape, tokens: int, seconds: float, block_size: int) -> None:
        """shape: the step so far; tokens: that may be added; seconds: the whole step may take, inf = no matter."""
        self.cost = cost
        self.shape = shape
        self.tokens = tokens
        self.block_size = block_size
        # Some prompt always moves on, by what fills the last tile: else streams that are too slow for their own promise
        # would keep every prompt out for ever.
        least = min(tokens, cost.tile - shape.num_tokens % cost.tile)
        self._least = shape.num_tokens + least
        self._seconds = seconds

    def chunk(self, start: int, wanted: int) -> int:
        """How many of `wanted` tokens at positions start, start + 1, … still fit; 0 = none.

        What has to be cut ends where the step's last tile, or nearly there a block, is full.
        """
        most = max(min(wanted, self.tokens), 0)
        if most and not math.isinf(self._seconds) and not self._fits(start, most):
            low, high = 0, most  # low fits, high does not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._fits(start, middle) else (low, middle)
            most = max(low, min(most, self._least - self.shape.num_tokens))
        return most if most == wanted else self._cut(start, most)

    def spend(self, start: int, count: int) -> None:
        """`count` tokens at position `start` are in the step."""
        self.shape = self.shape.plus(start, count)
        self.tokens -= count

    def _fits(self, start: int, count: int) -> bool:
        return self.cost.seconds(self.shape.plus(start, count)) <= self._seconds

    def _cut(self, start: int, count: int) -> int:
        over = (self.shape.num_tokens + count) % self.cost.tile
        count -= over if over < count else 0
        over = (start + count) % self.block_size
        return count - over if over <= count * BLOCK_END else count


def equal_time_seconds(cost: StepCost, shape: StepShape, tokens: int) -> float:
    """How long the step takes with `tokens` at the beginning of a prompt: later chunks that are to take as long are
    shorter, as their context is longer (dynamic chunking of Qwen2.5-1M, arXiv 2501.15383)."""
    return cost.seconds(shape.plus(0, tokens)) if tokens > 0 else math.inf
