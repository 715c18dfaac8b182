"""A Prometheus of our own on loopback, with the configuration of the stack but for addresses and intervals."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from monitoring.queries import RULES, STACK

from quire.bench.soak.served import free_port, wait_for

PROGRAMS = ("prometheus", "promtool")
START_SECONDS = 120.0


def installed() -> bool:
    return all(shutil.which(program) for program in PROGRAMS)


class Prometheus:
    """What its HTTP API says. Raises RuntimeError with its words where it refuses a question."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **params: str) -> Any:
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(params)}", timeout=60
            ) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None

    def values(self, query: str, begin: float, end: float, step: float = 1.0) -> list[list[float]]:
        """Of each series, what it was between two times."""
        found = self.ask("query_range", query=query, start=str(begin), end=str(end), step=str(step))
        return [[float(value) for _, value in series["values"]] for series in found["result"]]

    def firing(self) -> set[str]:
        alerts = self.ask("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """It scrapes `target` (host:port) every second, and judges the rules every other one."""
    folder.mkdir()
    config = yaml.safe_load((STACK / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "2s"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(RULES, folder)
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        one = Prometheus(f"http://127.0.0.1:{port}")
        wait_for(lambda: process.poll() is not None or one.answers(), START_SECONDS, "Prometheus' start")
        if process.poll() is not None:
            raise RuntimeError((folder / "log").read_text(encoding="utf-8"))
        yield one
    finally:
        process.terminate()
        process.wait()
