"""A server to lean on: `quire serve` as a process of its own, what can be seen of it from outside, and its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec

START_SECONDS = 300.0  # a start takes some; a machine that does much else takes longer
SETTLE_SECONDS = 60.0  # after which what has not been given back is lost
LOOK_SECONDS = 0.02


class SoakError(Exception):
    """The check could not be made: the server did not start, or did not do what every server must."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """How many seconds it took until `condition` held. Raises SoakError after `seconds`."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds:
            raise SoakError(f"{what} did not happen within {seconds:g} s")
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - begin


class Served:
    """Ready when it is entered; killed with all that is below it when it is left, unless it has ended.

    folder    new; the log and the process's temporary files go there
    window    whether its inside can be looked into (`window.py`)
    """

    def __init__(self, folder: Path, model: str, *options: str, port: int | None = None, window: bool = False) -> None:
        folder.mkdir(parents=True)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._seen: dict[int, bytes] = {}  # processes below the server, by when they were born
        self._window = folder / "window.json"
        module = ("quire.bench.soak.window", str(self._window)) if window else ("quire.server.cli",)
        command = [sys.executable, "-P", "-m", *module, "serve", model, "--port", str(self.port), *options]
        self.began = time.monotonic()
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(self.temporary)}
            )

    def __enter__(self) -> Served:
        """Raises SoakError if it does not start."""
        try:
            wait_for(
                lambda: self.process.poll() is not None or self.status("/ready") == 200, START_SECONDS, "the start"
            )
            self.start_seconds = time.monotonic() - self.began
            if self.process.poll() is not None:
                raise SoakError(f"the server ended: {self.log.read_text()[-2000:]}")
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Kill whoever is left of all that were ever seen: an engine may outlive its server."""
        self.family()
        self.process.kill()
        for pid, born in self._seen.items():
            if _born(pid) == born:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    # ---------------------------------------------------------------- what anybody sees

    def status(self, path: str) -> int | None:
        """HTTP status of a GET; None if nobody answers."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return None

    def metrics(self) -> dict[str, float]:
        """By name, and by name with its labels but the model's: `a_total` is the sum over all `a_total{k="v"}`."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            return read_metrics(answer.read().decode())

    def load_seconds(self) -> float:
        """What the engine's own start took, from its first line of code to its readiness."""
        return self.metrics()["quire_startup_seconds"]

    # ---------------------------------------------------------------- what the system sees

    def engine_pid(self) -> int:
        """Raises SoakError if there is none."""
        for pid in descendants(self.process.pid):
            if b"quire.engine.process" in _read(pid, "cmdline"):
                return pid
        raise SoakError("there is no engine")

    def family(self) -> list[int]:
        """The server and all below it."""
        below = descendants(self.process.pid) if self.process.poll() is None else []
        self._seen.update((pid, _born(pid)) for pid in below)
        return [self.process.pid, *below]

    def traces(self) -> set[Path]:
        """What it has in the file system while it runs, and must not leave there: temporary files, shared memory."""
        maps = b"".join(_read(pid, "maps") for pid in self.family()).decode(errors="replace")
        return {*self.temporary.rglob("*"), *map(Path, re.findall(r"/dev/shm/[^\s]+", maps))}

    def rss(self) -> dict[str, float]:
        """MB (10^6 bytes) of each of the two processes."""
        page = os.sysconf("SC_PAGE_SIZE") / 1e6
        pids = {"server": self.process.pid, "engine": self.engine_pid()}
        return {name: int(_read(pid, "statm").split()[1]) * page for name, pid in pids.items()}

    def holdings(self) -> dict[str, float]:
        """All that is counted and must come back: blocks, samples, tasks, objects, descriptors, threads, children."""
        self._window.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        wait_for(self._window.exists, SETTLE_SECONDS, "a look inside")
        held: dict[str, float] = msgspec.json.decode(self._window.read_bytes(), type=dict[str, float])
        for name, pid in (("server", self.process.pid), ("engine", self.engine_pid())):
            held[f"{name} descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
            held[f"{name} threads"] = len(os.listdir(f"/proc/{pid}/task"))
        held["children"] = len(descendants(self.process.pid))
        metrics = self.metrics()
        held["KV blocks (%)"] = 100 * metrics["quire_kv_cache_usage_perc"]
        held["running samples"] = metrics["quire_num_requests_running"]
        held["waiting samples"] = metrics["quire_num_requests_waiting"]
        return held

    def leaks(self, before: dict[str, float], patience: float = SETTLE_SECONDS) -> dict[str, float]:
        """What is held beyond `before` and not given back within `patience` seconds."""
        end = time.monotonic() + patience
        while True:
            held = self.holdings()
            left = {name: count - before.get(name, 0) for name, count in held.items() if count > before.get(name, 0)}
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.5)

    def at_rest(self) -> dict[str, float]:
        """`holdings`, once nothing changes any more: what a server keeps that has been used."""
        held = self.holdings()
        end = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end:
            time.sleep(2)  # an idle engine tells its figures once a second
            if (again := self.holdings()) == held:
                return held
            held = again
        raise SoakError("the server does not come to rest")


def read_metrics(text: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        series, _, value = line.rpartition(" ")
        name, _, labels = series.partition("{")
        values[name] = values.get(name, 0.0) + float(value)
        if own := re.sub(r'model_name="[^"]*",?', "", labels.removesuffix("}")):
            values[f"{name}{{{own.removesuffix(',')}}}"] = float(value)
    return values


def alive(pid: int) -> bool:
    """Runs, and is no zombie."""
    return (status := _read(pid, "stat")) != b"" and status.rpartition(b")")[2].split()[0] != b"Z"


def _born(pid: int) -> bytes:
    """In ticks of the machine's clock: tells a process from a later one of the same number. Empty if it is gone."""
    return (status := _read(pid, "stat")) and status.rpartition(b")")[2].split()[19]


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`."""
    found = list(_children(pid))
    return found + [below for child in found for below in descendants(child)]


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            yield from map(int, _read(pid, f"task/{task}/children").split())


def _read(pid: int, name: str) -> bytes:
    """Empty where the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""
