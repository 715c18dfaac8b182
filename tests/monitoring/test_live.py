"""The board and the alerts beside a real server under load: `make ops-test`."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from monitoring.drawing.draw import BUILT, answers, draw, ready
from monitoring.prometheus import Prometheus, installed, prometheus
from monitoring.queries import RULES, STACK, Query, board_queries, rule_queries, rules, selectors
from monitoring.traffic import OPTIONS, drive, keys_file

from quire.bench.soak.served import Served, free_port, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed(), reason="prometheus and promtool are not installed: make ops-test"),
]

LOAD_SECONDS = 45.0
PATIENCE = 120.0  # for what comes within a few seconds on a machine that does nothing else

# Nothing is wrong with this server before it is hurt, and no weights are broken.
CALM = {"Alerts that fire", "Restarts and hangs"}


@dataclass(frozen=True, slots=True)
class Watched:
    """A server and the Prometheus beside it; between `begin` and `end` there was load."""

    served: Served
    prometheus: Prometheus
    begin: float
    end: float


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("stack")
    keys = folder / "keys.yaml"
    keys.write_text(keys_file(), encoding="utf-8")
    port = free_port()
    served = Served(folder / "served", "bundled", "--api-keys-file", str(keys), "--health-port", str(port), *OPTIONS)
    with served, prometheus(folder / "prometheus", f"127.0.0.1:{port}") as one:
        begin = time.time()
        result = asyncio.run(drive(served.url, LOAD_SECONDS))
        assert result.summary.completed > 0
        yield Watched(served, one, begin, time.time())


@pytest.mark.parametrize("query", [*board_queries()], ids=lambda query: f"{query.where}: {query.legend}")
def test_every_question_of_the_board_has_an_answer_under_load(watched: Watched, query: Query) -> None:
    series = watched.prometheus.values(query.text, watched.begin, watched.end)
    numbers = [value for values in series for value in values if math.isfinite(value)]
    assert numbers
    assert any(numbers) or any(f"{title!r}" in query.where for title in CALM), "it is nothing but zeros"


@pytest.mark.skipif(not ready(), reason="no Chromium, or Grafana's components are not built: make ops-test")
def test_the_board_is_drawn_and_no_panel_is_empty(watched: Watched, tmp_path: Path) -> None:
    told = answers(watched.prometheus, watched.begin, watched.end)
    assert draw(told, BUILT / "board.png") == []
    unheard = told | {"answers": {panel: {} for panel in told["answers"]}}
    assert len(draw(unheard, tmp_path / "unheard.png")) == len({query.where for query in board_queries()})


def test_a_question_that_nobody_can_answer_has_none(watched: Watched) -> None:
    assert watched.prometheus.values("quire_sneezes_total", watched.begin, watched.end) == []
    with pytest.raises(RuntimeError, match="parse error"):
        watched.prometheus.values("rate(quire_sneezes_total)", watched.begin, watched.end)


def test_prometheus_has_all_rules_and_none_is_in_error(watched: Watched) -> None:
    wait_for(lambda: all(rule["lastEvaluation"] > "0002" for rule in _loaded(watched)), PATIENCE, "the rules' turn")
    found = {rule["name"]: (rule["health"], rule.get("lastError", "")) for rule in _loaded(watched)}
    assert found == {rule["alert"]: ("ok", "") for rule in rules()}


@pytest.mark.parametrize("query", [*rule_queries()], ids=lambda query: query.where)
def test_what_a_rule_looks_at_is_there(watched: Watched, query: Query) -> None:
    """Without its thresholds: an alert that could never fire looks like one that need not."""
    for one in selectors(query.text):
        assert watched.prometheus.values(one.text, watched.begin, watched.end), one.text


def test_an_engine_that_is_killed_is_told(watched: Watched) -> None:
    assert "QuireEngineRestarted" not in watched.prometheus.firing()
    os.kill(watched.served.engine_pid(), signal.SIGKILL)
    wait_for(lambda: "QuireEngineRestarted" in watched.prometheus.firing(), PATIENCE, "the alert")
    wait_for(lambda: watched.served.status("/ready") == 200, PATIENCE, "the restart")
    assert "QuireEngineKeepsRestarting" not in watched.prometheus.firing()


# ---------------------------------------------------------------- the rules' own tests


def test_the_rules_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    assert _tested(tmp_path, RULES.read_text(encoding="utf-8")) == 0


@pytest.mark.parametrize("broken", ["never", "always"])
@pytest.mark.parametrize("name", [rule["alert"] for rule in rules()])
def test_a_rule_that_is_broken_is_found(tmp_path: Path, name: str, broken: str) -> None:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    (rule,) = (rule for group in groups["groups"] for rule in group["rules"] if rule["alert"] == name)
    rule["expr"] = "vector(1) > 2" if broken == "never" else 'label_replace(vector(1), "instance", "any", "", "")'
    rule.pop("for", None)
    assert _tested(tmp_path, yaml.safe_dump(groups)) != 0


def _tested(folder: Path, text: str) -> int:
    (folder / RULES.name).write_text(text, encoding="utf-8")
    (folder / "alerts_test.yml").write_text((STACK / "prometheus" / "alerts_test.yml").read_text(), encoding="utf-8")
    command = ["promtool", "test", "rules", "alerts_test.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode


def _loaded(watched: Watched) -> list[dict[str, str]]:
    return [rule for group in watched.prometheus.ask("rules")["groups"] for rule in group["rules"]]
