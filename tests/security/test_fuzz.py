"""A small share of `make fuzz`, beside the victims."""

from __future__ import annotations

import pytest
from security import fuzz_http
from security.fuzz_http import Attack
from security.house import House
from security.tally import Tally


@pytest.mark.parametrize(
    ("attack", "count"),
    [(fuzz_http.bodies, 120), (fuzz_http.described, 80), (fuzz_http.raw, 60)],
    ids=lambda x: str(x)[:16],
)
def test_inputs_that_are_nearly_right(victim: House, attack: Attack, count: int) -> None:
    tally = Tally()
    attack(victim, tally, count, 3)
    assert tally.troubles == []
    assert tally.refused > count // 4
