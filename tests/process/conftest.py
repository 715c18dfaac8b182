"""A real server process with its engine in another, on a tiny random model."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

START_SECONDS = 120  # a start takes 3 s; a machine that runs much else may take far longer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`quire serve` on a free port; its output goes to `log`, its temporary files into a folder beside it."""

    def __init__(self, model: Path, log: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.temporary = log.with_suffix(".tmp")
        self.temporary.mkdir()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-P", "-m", "quire.server.cli", "serve", str(model), "--port", str(self.port)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--dtype", "float32", "--threads", "1", *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )

    def wait_until_ready(self) -> Server:
        _wait_for(lambda: self.process.poll() is not None or self.status("/ready") == 200, START_SECONDS)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def status(self, path: str) -> int | None:
        """HTTP status of a GET; None if nobody answers."""
        try:
            return httpx.get(self.url + path, timeout=5).status_code
        except httpx.TransportError:
            return None

    def engine_pid(self) -> int:
        return self.engine_pids()[0]

    def engine_pids(self) -> list[int]:
        return [pid for pid in _descendants(self.process.pid) if b"quire.engine.process" in _cmdline(pid)]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        _wait_for(condition, seconds)

    def family(self) -> list[int]:
        """Process ids of the server and everything below it."""
        return [self.process.pid, *_descendants(self.process.pid)]

    def metric(self, name: str) -> float:
        """Sum of a metric's samples."""
        lines = httpx.get(f"{self.url}/metrics", timeout=5).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.split("[{ ]", line)[0] == name)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def _cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _descendants(pid: int) -> list[int]:
    """Process ids below `pid`, from /proc."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents.setdefault(int(stat.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


@pytest.fixture
def launch_server(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """launch_server(*options, port=None, model=None) -> Server that has just begun; everything is killed at the end."""
    servers: list[Server] = []

    def launch(*options: str, port: int | None = None, model: Path | None = None) -> Server:
        servers.append(Server(model or tiny_model, tmp_path / f"server{len(servers)}.log", *options, port=port))
        return servers[-1]

    yield launch
    for server in servers:
        for pid in server.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()


@pytest.fixture
def start_server(launch_server: Callable[..., Server]) -> Callable[..., Server]:
    """As launch_server, and the server is ready."""

    def start(*options: str, port: int | None = None) -> Server:
        return launch_server(*options, port=port).wait_until_ready()

    return start
