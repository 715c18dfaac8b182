"""The soak's way of finding what requests leave behind, on a real server, with leaks that are planted."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.bench.soak import aborts


@pytest.mark.slow
def test_clients_that_leave_leave_nothing_and_every_planted_leak_is_found(tmp_path: Path):
    rows = aborts.check(tmp_path, model="bundled", count=200, seed=3)
    assert [row for row in rows if row.ok is False] == []
    assert {row.what: row.measured for row in rows}["planted leaks found"] == "6 of 6"
