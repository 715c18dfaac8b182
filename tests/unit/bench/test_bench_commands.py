"""`quire bench …`: every setting of a benchmark is an option, and reaches it."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from quire.bench import capacity, eviction, fairness, idealized, prefill, samples, slo
from quire.server import cli
from quire.server.cli_bench_report import plain

COMMANDS: dict[str, tuple[ModuleType, type]] = {
    "capacity": (capacity, capacity.CapacityConfig),
    "fairness": (fairness, fairness.FairnessConfig),
    "idealized": (idealized, idealized.IdealizedConfig),
    "prefill": (prefill, prefill.PrefillConfig),
    "samples": (samples, samples.SamplesConfig),
    "slo": (slo, slo.SloConfig),
}
REPORT_ONLY = {"json_file"}
DRAWN = {"capacity": {"report_file"}}  # what can be drawn as well


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *args], env={"COLUMNS": "200", "TERM": "dumb"})


def options_of(command: str) -> dict[str, object]:
    bench = get_command(cli.app).commands["bench"]  # type: ignore[attr-defined]
    return {parameter.name: parameter.default for parameter in bench.commands[command].params}


@pytest.mark.parametrize("command", [*COMMANDS, "eviction", "frontend", "overload"])
def test_it_explains_itself(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_is_an_option_with_its_default(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, config_type = COMMANDS[command]
    settings = {field.name for field in fields(config_type)}
    assert set(options_of(command)) - {"help"} == settings | REPORT_ONLY | DRAWN.get(command, set())
    made: list[object] = []

    def run(config: object, *progress: object) -> None:
        made.append(config)
        raise ValueError("--no --measurement [here]")

    monkeypatch.setattr(module, "run", run)
    needed = ["--simulate"] if command == "capacity" else []
    result = invoke(command, *needed)
    assert result.exit_code == 1
    assert "--no --measurement [here]" in result.output
    assert made == [config_type(simulate=True) if needed else config_type()]


def test_eviction_reaches_its_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[eviction.EvictionConfig] = []

    def run(config: eviction.EvictionConfig) -> dict[str, list[int]]:
        made.append(config)
        return {"rows": []}

    monkeypatch.setattr(eviction, "run", run)
    monkeypatch.setattr(eviction, "table", lambda result: "nothing")
    file = tmp_path / "out.json"
    result = invoke("eviction", "--fractions", "0.2, 0.5", "--seed", "3", "--sessions", "9", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert (made[0].fractions, made[0].seed, made[0].sessions.sessions) == ((0.2, 0.5), 3, 9)
    assert json.loads(file.read_text()) == {"rows": []}


@pytest.mark.parametrize(
    "args",
    [
        "capacity",
        "capacity --simulate --profile nowhere",
        "capacity --simulate --systems magic",
        "capacity --simulate --slo soon",
        "fairness --simulate --policies lottery",
        "fairness --simulate --url http://127.0.0.1:9",
        "prefill --lengths zipf",
        "prefill --max-len 3",
        "slo --load 2",
        "eviction --fractions much",
    ],
)
def test_bad_settings_are_one_line_and_exit_code_1(args: str) -> None:
    result = invoke(*args.split())
    assert result.exit_code == 1
    assert "quire bench:" in result.output
    assert "Traceback" not in result.output


def test_a_simulated_fairness_run_is_written(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    args = "--simulate --policies fair --flood-requests 2 --visits 2 --profile a100-7b --json"
    result = invoke("fairness", *args.split(), str(file))
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["solo_p95_ttft_ms"] > 0
    assert set(written["flooded_p95_ttft_ms"]) == {"fair"}


def test_what_is_not_known_is_null() -> None:
    given = {"a": math.nan, "b": [1.5, math.inf], "c": (None, {"d": -math.inf})}
    assert plain(given) == {"a": None, "b": [1.5, None], "c": [None, {"d": None}]}
