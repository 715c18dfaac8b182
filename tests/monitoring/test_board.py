"""The board in the repository is the one that board.py writes, and one that can be drawn."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from monitoring.queries import board

from quire.deploy.compose import board as source

PANELS: list[dict[str, Any]] = board()["panels"]


def test_the_file_is_the_one_that_is_written() -> None:
    assert source.BOARD.read_text(encoding="utf-8") == source.text(), (
        "the board is stale: python -m quire.deploy.compose.board --write"
    )


def test_a_panel_that_changes_makes_the_file_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(source.ROWS, "Now", source.ROWS["Now"][1:])
    assert source.BOARD.read_text(encoding="utf-8") != source.text()


def test_panels_lie_beside_each_other_within_the_grid() -> None:
    places = [panel["gridPos"] for panel in PANELS]
    assert all(at["x"] >= 0 and at["x"] + at["w"] <= 24 for at in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_every_panel_has_an_id_a_title_and_says_what_it_shows() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["targets"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
