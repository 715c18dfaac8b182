"""What came of many bad inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    refused: int = 0
    taken: int = 0
    troubles: list[str] = field(default_factory=list)
    how: Counter[str] = field(default_factory=Counter)  # refusals by their kind

    @property
    def cases(self) -> int:
        return self.refused + self.taken + len(self.troubles)
