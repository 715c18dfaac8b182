from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.hardware import read_profile
from quire.bench.idealized import Cell, Idealized, IdealizedConfig, fit, never_falling, quality, run, table

PROMPTS = (1, 16, 64, 256, 1024)


def first_token(p: int) -> float:
    return 0.004 + 3e-5 * p + 1e-8 * p * p


def cells(g0: float, g1: float, noise: float = 0.0, seed: int = 0) -> list[Cell]:
    """T(p, o) summed token by token, as the definition has it."""
    draw = random.Random(seed)
    made = []
    for p in PROMPTS:
        seconds = first_token(p)
        for o in range(1, 40):
            made.append(Cell(p, o, seconds * (1 + draw.gauss(0, noise))))
            seconds += g0 + g1 * (p + o)
    return made


@given(st.floats(1e-4, 1e-1), st.floats(1e-9, 1e-4))
def test_f_and_g_are_recovered(g0: float, g1: float) -> None:
    model = fit(cells(g0, g1))
    assert model.g0 == pytest.approx(g0, rel=1e-6, abs=1e-10)
    assert model.g1 == pytest.approx(g1, rel=1e-6, abs=1e-12)
    assert model.first == pytest.approx([first_token(p) for p in PROMPTS])
    assert quality(model, cells(g0, g1)).r2 == pytest.approx(1)


def test_noise_is_averaged_out_and_told() -> None:
    noisy = cells(5e-3, 2e-6, noise=0.03)
    model = fit(noisy)
    assert model.g0 == pytest.approx(5e-3, rel=0.05)
    told = quality(model, noisy)
    assert 0.98 < told.r2 < 1
    assert 0.01 < told.mean_relative_error < 0.05
    assert told.max_error**2 >= told.mse > 0


def test_a_constant_g_misses_what_context_costs() -> None:
    """The published form, with g1 = 0, on an engine whose tokens get slower: visibly worse."""
    grown = cells(1e-3, 5e-6)
    model = fit(grown)
    flat = Idealized(model.prompts, model.first, model.g0 + model.g1 * 300, 0.0)
    assert quality(flat, grown).r2 < 0.99 < quality(model, grown).r2


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_never_falling_is_the_nearest_monotone_sequence(values: list[float]) -> None:
    smooth = never_falling(values)
    assert len(smooth) == len(values)
    assert all(a <= b + 1e-9 for a, b in pairwise(smooth))
    assert sum(smooth) == pytest.approx(sum(values), abs=1e-6)
    if values == sorted(values):
        assert smooth == values


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.integers(1, 5000), st.integers(1, 5000))
def test_interpolation_is_monotone(values: list[float], a: int, b: int) -> None:
    prompts = tuple(1 + 37 * i for i in range(len(values)))
    model = Idealized(prompts, tuple(never_falling(values)), 1e-3, 1e-6)
    low, high = sorted((a, b))
    assert model.first_token(low) <= model.first_token(high) + 1e-9
    assert model.seconds(low, 5) <= model.seconds(high, 5) + 1e-9


def test_the_grid_itself_is_met_and_between_is_between() -> None:
    model = Idealized((10, 20), (1.0, 3.0), 0.0, 0.0)
    assert [model.first_token(p) for p in (10, 15, 20, 25)] == [1.0, 2.0, 3.0, 4.0]
    assert model.first_token(1) == 0.0  # never negative


def test_missing_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="one token"):
        fit([Cell(5, 2, 0.1)])
    with pytest.raises(ValueError, match="more"):
        fit([Cell(5, 1, 0.1)])


def test_a_live_engine_gives_a_profile_that_the_simulator_reads(tiny_model: Path, tmp_path: Path) -> None:
    import json

    result = run(IdealizedConfig(model=str(tiny_model), threads=1, output_len=4, repetitions=1))
    assert result["cells"] == 4 * len(result["prompt_tokens"])
    assert math.isfinite(result["g0_seconds"] + result["g1_seconds_per_token"])
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(result))
    profile = read_profile(str(file))
    assert profile.cost._asdict() == result["cost"]
    assert profile.max_model_len == 512
    assert table(result).row_count == len(result["prompt_tokens"])
