"""The soak's own judges: slopes from noisy points, figures read from metrics, and failures that are told."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from quire.bench.soak import __main__ as soak
from quire.bench.soak import fuzz
from quire.bench.soak.mix import any_request
from quire.bench.soak.served import SoakError, read_metrics
from quire.bench.soak.slope import theil_sen
from quire.bench.soak.verdict import Row, all_of, at_most, none


def test_the_slope_of_a_line_is_exact():
    slope = theil_sen([(x / 10, 3 * x / 10 - 7) for x in range(20)])
    assert slope == pytest.approx((3, 3, 3))


@pytest.mark.parametrize("grows", [0.0, 2.0])
def test_a_slope_is_found_under_noise_and_steps(grows: float):
    rng = random.Random(1)
    points = [(x / 100, grows * x / 100 + rng.gauss(0, 0.1) + (5 if rng.random() < 0.1 else 0)) for x in range(300)]
    slope = theil_sen(points)
    assert slope.low < slope.value < slope.high
    assert slope.value == pytest.approx(grows, abs=0.1)


def test_what_does_not_grow_and_what_does_are_told_apart():
    still = theil_sen([(x, 40.0 + (x % 7 == 0)) for x in range(100)])
    leaking = theil_sen([(x, 40.0 + 0.01 * x + (x % 7 == 0)) for x in range(100)])
    assert still.value == 0 < leaking.low


def test_two_points_are_no_slope():
    with pytest.raises(ValueError, match="three points"):
        theil_sen([(0, 0), (1, 1)])


def test_metrics_are_read_by_name_and_by_label():
    page = (
        "# HELP a_total text\n"
        'a_total{model_name="m",stage="waiting"} 2.0\na_total{model_name="m",stage="running"} 3.0\n'
        'b{model_name="m"} 0.5\nprocess_cpu_seconds_total 1e-3\n'
    )
    assert read_metrics(page) == {
        "a_total": 5.0,
        'a_total{stage="waiting"}': 2.0,
        'a_total{stage="running"}': 3.0,
        "b": 0.5,
        "process_cpu_seconds_total": 0.001,
    }


def test_requests_are_those_of_the_seed_and_of_many_kinds():
    asks = [any_request(random.Random(i), speculation=("none", "ngram")) for i in range(300)]
    assert asks == [any_request(random.Random(i), speculation=("none", "ngram")) for i in range(300)]
    bodies = [ask.body for ask in asks]
    assert len({ask.path for ask in asks}) == 2
    assert {body["stream"] for body in bodies} == {True, False}
    assert {body["speculative"]["method"] for body in bodies} == {"none", "ngram"}
    for field in ("n", "logprobs", "structured_outputs", "response_format", "stop", "seed"):
        assert any(field in body for body in bodies), field
    assert all(body["temperature"] > 0 for body in bodies if "n" in body)


def test_rows_judge_themselves():
    assert [at_most("c", "w", 1.0, 1.0).ok, at_most("c", "w", 1.1, 1.0).ok] == [True, False]
    assert [none("c", "w", 0).ok, none("c", "w", 1).ok] == [True, False]
    assert [all_of("c", "w", 3, 3).ok, all_of("c", "w", 2, 3).ok, all_of("c", "w", 0, 0).ok] == [True, False, False]


def test_a_failed_row_and_a_check_that_cannot_be_made_are_failures(monkeypatch, tmp_path, capsys):
    def impossible(plan: soak.Plan) -> list[Row]:
        raise SoakError("the start did not happen")

    checks = {"good": lambda plan: [none("good", "leaks", 0)], "bad": lambda plan: [none("bad", "leaks", 2)]}
    monkeypatch.setattr(soak, "CHECKS", checks | {"none": impossible})
    monkeypatch.setattr(soak.tempfile, "mkdtemp", lambda prefix: str(_made(tmp_path / "logs")))
    assert soak.main(["good", "--json", str(tmp_path / "good.json")]) == 0
    assert not (tmp_path / "logs").exists()
    assert soak.main(["--json", str(tmp_path / "all.json")]) == 1
    assert (tmp_path / "logs").exists(), "what the servers wrote is needed now"
    assert "2 of 3 failed" in capsys.readouterr().out
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [(row["check"], row["ok"]) for row in rows] == [("good", True), ("bad", False), ("none", False)]
    with pytest.raises(SystemExit):
        soak.main(["nonsense"])


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("code", "ok"), [("print('7 inputs')", True), ("print('7 inputs'); exit(1)", False)])
def test_a_command_is_taken_by_its_word_and_its_exit_code(tmp_path: Path, code: str, ok: bool):
    row = fuzz.judge(tmp_path, (sys.executable, "-c", code))
    assert (row.measured, row.ok) == ("7 inputs", ok)
