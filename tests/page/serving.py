"""A real server with the bundled model, and load for it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

WORDS = ("read", "write", "path", "open", "close", "list", "return", "self", "value", "key", "name", "index", "count")
START_SECONDS = 180


class Server:
    """`quire serve bundled` on a free port."""

    def __init__(self, log: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        command = [sys.executable, "-P", "-m", "quire.server.cli", "serve", "bundled", "--port", str(self.port)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--threads", "1", "--num-blocks", "900", *options], stdout=out, stderr=subprocess.STDOUT
            )
        wait_for(lambda: self.process.poll() is not None or self._status("/ready") == 200, START_SECONDS)
        assert self.process.poll() is None, log.read_text()

    def _status(self, path: str) -> int | None:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + path, timeout=5).status_code
        return None

    def kill_engine(self) -> None:
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines()[1:]:
            pid, parent, args = line.split(None, 2)
            if int(parent) == self.process.pid and "quire.engine.process" in args:
                os.kill(int(pid), signal.SIGKILL)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


class Load:
    """Streams of three tenants, now and then a long prompt, from `start` to `stop`."""

    def __init__(self, url: str, clients: int = 14) -> None:
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(clients)]

    def _run(self, number: int) -> None:
        draw = random.Random(number)
        common = " ".join(draw.choices(WORDS, k=60))
        with httpx.Client(timeout=120) as client:
            while not self._over.is_set():
                words = draw.choices(WORDS, k=500 if draw.random() < 0.3 else draw.randrange(10, 60))
                body: dict[str, Any] = {
                    "prompt": (common if number % 2 else "") + " ".join(words),
                    "max_tokens": draw.randrange(30, 160),
                    "temperature": 0.8 * (number % 2),
                    "tenant": ("alice", "bob", "research")[number % 3],
                    "ignore_eos": True,
                }
                with contextlib.suppress(httpx.HTTPError):
                    client.post(f"{self._url}/v1/completions", json=body)
                self._over.wait(draw.random())

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(150)
