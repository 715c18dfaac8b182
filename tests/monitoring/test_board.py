"""The board in the repository is the one that board.py writes, and one that can be drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from itertools import combinations
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from monitoring.queries import board

from quire.deploy.compose import board as source

# Fields that Grafana writes into boards of its own, and that its schema leaves out.
UNTOLD = {".templating.list[1].definition", ".annotations.list[0].titleFormat", ".annotations.list[0].textFormat"}
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


def test_every_field_is_one_that_grafanas_schema_knows() -> None:
    assert unknown(board()) == UNTOLD


def test_a_field_that_it_does_not_know_is_found() -> None:
    wrong = deepcopy(board())
    wrong["panels"][1]["options"]["graffMode"] = "area"
    wrong["panels"][1]["targets"][0]["query"] = "up"
    wrong["refreshes"] = "10s"
    found = {".panels[1].options.graffMode", ".panels[1].targets[0].query", ".refreshes"}
    assert unknown(wrong) == UNTOLD | found


def unknown(given: dict[str, Any]) -> set[str]:
    """Paths of what is lost where Grafana's types read the board and write it again."""
    register_default_plugins()
    return set(_lost(given, json.loads(JSONEncoder().encode(Dashboard.from_json(given)))))


def _lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from _lost(value, kept.get(name), f"{path}.{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{path}[{i}]")
    elif given != kept:
        yield path
