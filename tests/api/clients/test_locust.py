"""The locustfile that comes with Quire, run by Locust itself: its figures, and whether it sees broken streams."""

from __future__ import annotations

import asyncio
import csv
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from api.clients.served import KEY, served
from unit.bench.scripted_server import Script, serving

FILE = Path(__file__).parents[3] / "deploy" / "locust" / "locustfile.py"

# Not imported: Locust changes the sockets of whole processes.
pytestmark = pytest.mark.skipif(find_spec("locust") is None, reason="locust is not installed")

Rows = dict[str, dict[str, str]]  # name -> Locust's statistics


def command(url: str, folder: Path, users: int, seconds: int) -> list[str]:
    options = f"--headless --users {users} --spawn-rate {users} --run-time {seconds}s --only-summary --host {url}"
    return [sys.executable, "-m", "locust", "-f", str(FILE), *options.split(), "--csv", str(folder / "stats")]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "LLM_THINK": "0.05", "LLM_MAX_TOKENS": "12", **more}


def rows_of(folder: Path) -> Rows:
    with (folder / "stats_stats.csv").open(encoding="utf-8") as table:
        return {row["Name"]: row for row in csv.DictReader(table)}


def test_people_who_chat_with_a_real_server(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        done = subprocess.run(
            command(server.url, tmp_path, users=4, seconds=6),
            env=environment(LLM_API_KEY=KEY),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    whole, first, further = (
        rows[name] for name in ("/v1/chat/completions", "time to first token", "time per further token")
    )
    assert int(whole["Request Count"]) == int(first["Request Count"]) > 8
    assert whole["Failure Count"] == "0"
    assert 0 < float(first["Median Response Time"]) <= float(whole["Median Response Time"])
    assert float(further["Average Response Time"]) > 0
    assert 1 < float(first["Average Content Size"]) <= 12  # tokens


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (lambda events: events[:-1], "without [DONE]"),
        (lambda events: [*events[:-3], *events[-2:]], "without a finish reason"),
        (lambda events: [events[0], '{"error": {"message": "boom", "code": "engine_dead"}}', "[DONE]"], "engine_dead"),
    ],
)
async def test_a_broken_stream_is_a_failure(tmp_path: Path, spoilt, says: str) -> None:
    script = Script()
    script.spoil = lambda number, events: spoilt(events)
    async with serving(script) as url:
        process = await asyncio.create_subprocess_exec(
            *command(url, tmp_path, users=1, seconds=2),
            env=environment(),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(process.communicate(), 200)
    assert process.returncode == 1, said.decode()
    assert says in said.decode()
    assert script.bodies
    assert "time to first token" not in said.decode()
