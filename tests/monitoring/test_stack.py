"""The Compose stack: what its files say of each other is so. (Images are not pulled here, and nothing is run.)"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml
from monitoring.queries import STACK, rules

from quire.deploy.compose import board

CHOSEN = {"QUIRE_API_KEY": "key", "GRAFANA_PASSWORD": "word"}  # what compose.yaml wants to be told
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def composed(name: str = "compose.yaml") -> dict[str, Any]:
    """The file as Compose reads it, after its variables and against its specification."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        assert name in CHOSEN or kind == "-", f"{name} has no default, and nobody is told of it"
        return CHOSEN.get(name, rest)

    text = VARIABLE.sub(value, (STACK / name).read_text(encoding="utf-8"))
    spec = compose_spec.PyCompose.from_yaml(text)
    spec.validate()
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where in the container -> what of this folder, or which volume."""
    return {where: what for what, where in (volume.split(":")[:2] for volume in service["volumes"])}


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_file_keeps_to_the_specification(name: str) -> None:
    assert composed(name)["services"]


def test_a_file_that_does_not_is_refused() -> None:
    with pytest.raises(ValueError, match="imagge"):
        compose_spec.PyCompose.from_yaml("services: {quire: {imagge: quire}}").validate()


def test_the_folders_that_are_mounted_exist_and_volumes_are_declared() -> None:
    stack = composed()
    for service in stack["services"].values():
        for what in mounts(service).values():
            assert (STACK / what).exists() if what.startswith(".") else what in stack["volumes"], what


def test_who_asks_whom_has_a_service_and_a_port() -> None:
    services = composed()["services"]
    (job,) = load(STACK / "prometheus" / "prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    command = services["quire"]["command"]
    assert target == f"quire:{command[command.index('--health-port') + 1]}"
    assert job["job_name"] == "quire"
    (source,) = load(STACK / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services


def test_grafana_finds_the_board_and_its_rates_span_four_scrapes() -> None:
    grafana = composed()["services"]["grafana"]
    (provider,) = load(STACK / "grafana" / "provisioning" / "dashboards" / "boards.yml")["providers"]
    folder = STACK / mounts(grafana)[provider["options"]["path"]]
    assert folder.resolve() == board.BOARD.parent.resolve()
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{board.BOARD.name}"
    config = load(STACK / "prometheus" / "prometheus.yml")
    (source,) = load(STACK / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert all((STACK / "prometheus" / name).is_file() for name in config["rule_files"])


def test_only_this_machine_is_listened_on_and_images_are_pinned() -> None:
    for name, service in composed()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert name == "quire" or re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])


def test_the_command_is_one_that_quire_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    """--help after it stops before anything starts; an option that is none would be an error."""
    from typer.testing import CliRunner

    from quire.server.cli import app

    for name in [name for name in os.environ if name.startswith("QUIRE_")]:
        monkeypatch.delenv(name)
    command = composed()["services"]["quire"]["command"]
    assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--healthy-port", "8001", "--help"]).exit_code == 2


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in rules():
        assert rule["alert"].startswith("Quire")
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "remedy"}


def test_every_alert_is_expected_by_a_test_of_the_rules() -> None:
    tests = (STACK / "prometheus" / "alerts_test.yml").read_text(encoding="utf-8")
    assert set(re.findall(r'alertname="(\w+)"', tests)) == {rule["alert"] for rule in rules()}


def test_the_page_tells_every_alert_and_counts_what_there_is() -> None:
    page = (STACK.parents[1] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(Quire\w+)` \| .* \| (\w+) \|$", page, re.MULTILINE))
    assert told == {rule["alert"]: rule["labels"]["severity"] for rule in rules()}
    assert f"{len(rules())} rules" in page
    assert f"{sum(len(panels) for panels in board.ROWS.values())} panels in eight rows" in page
    assert len(board.ROWS) == 8
