"""Which tile is taken: by rule, by measurement, and how it is searched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.kernels import tuning
from quire.kernels.tuning import A100, BUCKETS, DENSE, H100, Shape, Tile, bucket, candidates, default_tile, search

OPS = ("linear_int4", "linear_int8", "linear_w8a8", "linear_fp8", "linear_fp8_block")
HOPPER_SHARED = 227 * 1024


def group_of(op: str, inputs: int) -> int:
    return 128 if op in ("linear_int4", "linear_fp8_block") else inputs


@given(rows=st.integers(1, 20000))
def test_a_bucket_holds_its_rows(rows: int) -> None:
    chosen = bucket(rows)
    assert chosen in BUCKETS
    assert chosen >= rows or chosen == BUCKETS[-1]
    assert bucket(chosen) == chosen


@given(
    op=st.sampled_from(OPS),
    rows=st.sampled_from(BUCKETS),
    outputs=st.integers(1, 60000),
    steps=st.integers(1, 250),
    card=st.sampled_from([A100, H100]),
)
def test_the_rule_fits_the_card(op: str, rows: int, outputs: int, steps: int, card: tuning.Card) -> None:
    inputs = 128 * steps
    shape = Shape(rows, outputs, inputs, group_of(op, inputs))
    tile = default_tile(op, shape, card)
    if tile == DENSE:
        assert op == "linear_int4"
        assert rows > 512
        return
    assert shape.group % tile.inputs == 0
    assert tile.slices == 1 or inputs // tile.inputs >= 4 * tile.slices
    assert tile.stages * (tile.rows * 2 + tile.outputs) * tile.inputs <= (163 if card is A100 else 227) * 1024


def test_decodes_of_few_tiles_are_sliced() -> None:
    for outputs, inputs in ((4096, 4096), (4096, 14336), (8192, 8192)):
        tile = default_tile("linear_int4", Shape(16, outputs, inputs, 128), H100)
        programs = outputs // tile.outputs * tile.slices
        assert 2 * H100.processors <= programs <= 4 * H100.processors or tile.slices == inputs // 128 // 4


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [16, 64, 1024])
def test_candidates_can_run(op: str, rows: int) -> None:
    shape = Shape(rows, 4096, 4096, group_of(op, 4096))
    tiles = list(candidates(op, shape, HOPPER_SHARED))
    assert len(tiles) == len(set(tiles)) > 10
    assert (DENSE in tiles) == (op == "linear_int4" and rows >= 128)
    for tile in tiles:
        if tile != DENSE:
            assert tile.stages * tile.outputs * tile.inputs // 2 <= HOPPER_SHARED
            assert tile.slices * tile.inputs <= 4096
    fewer = list(candidates(op, shape, 64 * 1024))
    assert set(fewer) < set(tiles)


def test_candidates_leave_no_slice_without_work() -> None:
    assert {tile.slices for tile in candidates("linear_int4", Shape(16, 4096, 256, 128), HOPPER_SHARED)} == {1}


def test_search_takes_the_fastest_that_runs() -> None:
    tiles = [Tile(16, 64, 128, s, 4, 3) for s in (1, 2, 4, 8)]
    clock = dict(zip(tiles, (3.0, None, 1.0, 1.0), strict=True))
    assert search(tiles, clock.get) == (tiles[2], 1.0)
    with pytest.raises(ValueError, match="no tile can run"):
        search(tiles[1:2], clock.get)


def test_what_was_measured_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, measured = Shape(32, 4096, 4096, 128), Tile(32, 256, 128, 2, 8, 5)
    path = tuning.write(tmp_path, "NVIDIA H100 80GB HBM3", "linear_int4", {shape: measured})
    assert path.name == "nvidia-h100-80gb-hbm3-linear_int4.json"
    tuning.write(tmp_path, "NVIDIA H100 80GB HBM3", "linear_int4", {Shape(64, 4096, 4096, 128): DENSE})
    table = tuning.read(tmp_path, "NVIDIA H100 80GB HBM3", "linear_int4")
    assert table == {shape: measured, Shape(64, 4096, 4096, 128): DENSE}

    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "card", lambda device: H100)
    tuning.clear()
    device = torch.device("cpu")
    assert tuning.tile_for("linear_int4", Shape(17, 4096, 4096, 128), device) == measured
    unmeasured = Shape(16, 4096, 4096, 128)
    assert tuning.tile_for("linear_int4", unmeasured, device) == default_tile("linear_int4", unmeasured, H100)
    tuning.clear()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"tiles": {"1x2": [1]}}', '{"tiles": {"1x2x3x4": [1, 2, 3, 4, 5, -6]}}']
)
def test_a_broken_table_is_named(tmp_path: Path, content: str) -> None:
    path = tuning.path_of(tmp_path, "card", "linear_fp8")
    path.write_text(content)
    with pytest.raises(ValueError, match=r"card-linear_fp8\.json: not a table of tiles"):
        tuning.read(tmp_path, "card", "linear_fp8")


def test_shipped_tables_can_be_read() -> None:
    for path in tuning.FOLDER.glob("*-linear_*.json"):
        table = json.loads(path.read_text())
        assert tuning.path_of(tuning.FOLDER, table["device"], table["op"]) == path
        assert tuning.read(tuning.FOLDER, table["device"], table["op"])
