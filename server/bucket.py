"""A token bucket: an allowance that is used up in pieces and comes back at a steady rate."""

from __future__ import annotations

ROUNDING = 1e-6  # of a token: what sums of small times lose


class Bucket:
    """Holds up to `capacity` and fills by `rate` a second; below zero is debt."""

    def __init__(self, capacity: float, rate: float, now: float) -> None:
        self.capacity = capacity
        self._rate = rate
        self._level = capacity
        self._seen = now

    def level(self, now: float) -> float:
        self._level = min(self.capacity, self._level + self._rate * max(0.0, now - self._seen))
        self._seen = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """A negative amount is given back."""
        self._level = min(self.capacity, self.level(now) - amount)

    def seconds_until(self, amount: float, now: float) -> float:
        """Until it holds so much; 0 if it does."""
        missing = amount - self.level(now)
        return missing / self._rate if missing > ROUNDING else 0.0

    def resize(self, capacity: float, rate: float, now: float) -> None:
        """What has been taken stays taken."""
        taken = self.capacity - self.level(now)
        self.capacity, self._rate, self._level = capacity, rate, capacity - taken
