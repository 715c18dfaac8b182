"""`quire tune` where there is no GPU: whose shapes, which settings, what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quire.bench import tune
from quire.engine.loader import BUNDLED_FOLDER
from quire.kernels import tuning
from quire.kernels.tuning import Shape, Tile
from quire.server import cli


def invoke(*args: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(cli.app, ["tune", *args], env={"COLUMNS": "200", "TERM": "dumb"})


def test_shapes_are_those_of_the_linear_layers() -> None:
    """256 wide, 4 + 2 + 2 heads of 64, feed-forward of 1024: o, down, qkv, gate and up."""
    assert tune.shapes_of(BUNDLED_FOLDER) == ((256, 256), (256, 1024), (512, 256), (2048, 256))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "there is no GPU here" in result.output


@pytest.mark.parametrize(("args", "named"), [(("--ops", "linear_int3"), "linear_int3"), (("--rows", "17"), "17")])
def test_what_cannot_be_measured_is_named(args: tuple[str, str], named: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 1
    assert f"{args[0]} {named}" in result.output


def test_options_reach_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tune.TuneConfig] = []

    def run(config: tune.TuneConfig, tell) -> list[Path]:  # type: ignore[no-untyped-def]
        made.append(config)
        tell(tune.Measured("linear_int4", Shape(16, 4096, 4096, 128), Tile(16, 128, 128, 8, 4, 4), 5e-6, 1e-5))
        return [tmp_path / "card-linear_int4.json"]

    monkeypatch.setattr(tune, "run", run)
    result = invoke(
        "--model", str(BUNDLED_FOLDER), "--ops", "linear_int4,linear_fp8", "--rows", "16", "--out", str(tmp_path)
    )
    assert result.exit_code == 0, result.output
    assert made == [tune.TuneConfig(BUNDLED_FOLDER, ("linear_int4", "linear_fp8"), (16,), tmp_path)]
    assert "5.0 µs, 2.00 x the rule's" in result.output
    assert "card-linear_int4.json" in result.output
    assert invoke().exit_code == 0
    assert made[1] == tune.TuneConfig(None, tune.OPS, tuning.BUCKETS, tuning.FOLDER)
