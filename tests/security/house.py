"""A real server process, what it holds, and two victims who must not notice what is done to it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 120  # a start takes 3 s; a machine that runs much else may take far longer
SETTLE_SECONDS = 60
READY_SECONDS = 2.0  # a probe that takes longer is a server that hangs; what it takes is reported, not judged
RSS_BYTES = 64 << 20  # allocators keep pages: only growth beyond this within one test is a leak for sure

KEYS = ("canary-key-4c1f9a", "canary-key-of-another")  # both open; neither may be seen anywhere
# What no answer may hold: addresses, tracebacks, paths, class and module names.
LEAKS = re.compile(
    r"0x[0-9a-fA-F]{6,}|Traceback|/(?:root|tmp|usr|home)/|site-packages|object at|<class|\.py\b|"
    r"pydantic|msgspec|starlette|uvicorn|jinja2|[a-z]+Error\b"
)

GREEDY = {"prompt": "The greedy victim", "temperature": 0, "max_tokens": 160, "ignore_eos": True}
SAMPLED = {"prompt": "The victim by lot", "temperature": 0.9, "top_p": 0.95, "seed": 11, "logprobs": 2} | {
    "max_tokens": 160,
    "ignore_eos": True,
    "presence_penalty": 0.5,
}


def wait_for(condition: Callable[[], bool], seconds: float, what: str = "it") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in time"
        time.sleep(0.02)


class House:
    """`quire serve` on a free port, in a process that can be looked into (`observed.py`)."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.headers = {"Authorization": f"Bearer {KEYS[0]}"}
        self.log = folder / "server.log"
        self._window = folder / "window.json"
        script = Path(__file__).with_name("observed.py")
        command = [sys.executable, str(script), str(self._window), "serve", str(model), "--port", str(self.port)]
        keys = folder / "keys"
        keys.write_text("\n".join(KEYS))
        options = (
            "--dtype",
            "float32",
            "--threads",
            "1",
            "--log-json",
            "--hang-timeout",
            "300",
            "--api-key-file",
            str(keys),
            *options,
        )
        with self.log.open("wb") as out:
            self.process = subprocess.Popen([*command, *options], stdout=out, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> House:
        wait_for(lambda: self.process.poll() is not None or self.status("/ready") == 200, START_SECONDS, "the start")
        assert self.process.poll() is None, self.log.read_text()
        return self

    def kill(self) -> None:
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    # ---------------------------------------------------------------- talking to it

    def status(self, path: str) -> int | None:
        """HTTP status of a GET; None if nobody answers."""
        try:
            return httpx.get(self.url + path, timeout=30).status_code
        except httpx.TransportError:
            return None

    def client(self, **headers: str) -> httpx.Client:
        """For many requests. Close it before what the server holds is looked at."""
        return httpx.Client(base_url=self.url, headers=self.headers | headers, timeout=120)

    def post(self, path: str = "/v1/completions", **settings: Any) -> httpx.Response:
        """One request on a connection of its own; `json=` or `content=`, and `headers=`."""
        headers = settings.pop("headers", {})
        with self.client(**{"Content-Type": "application/json"}) as client:
            return client.post(path, headers=headers, **settings)

    def crowd(self) -> None:
        """Many at once, so that pools that grow with use have their full size before anything is counted."""
        with self.client() as client, concurrent.futures.ThreadPoolExecutor(16) as pool:
            message = {"role": "user", "content": "x" * 100}
            body = {"messages": [message] * 3, "max_tokens": 2, "structured_outputs": {"regex": "[a-z]{2}"}}
            answers = pool.map(lambda i: client.post("/v1/chat/completions", json=body), range(48))
            assert {answer.status_code for answer in answers} == {200}

    def raw(self, *pieces: bytes, timeout: float = 30) -> bytes:
        """Everything that comes back on a connection of its own until it closes, or is silent for `timeout` seconds.

        A connection of which one half is closed counts as one that its client has left, so this one stays whole.
        """
        received = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            with contextlib.suppress(OSError):  # refused while still sending, or reset after the answer
                for piece in pieces:
                    connection.sendall(piece)
            with contextlib.suppress(OSError):
                while data := connection.recv(65536):
                    received += data
        return received

    def stream(self, body: dict[str, Any]) -> dict[str, Any]:
        """A streamed completion, folded: text, ids, log-probabilities, how it ended, and what it was charged."""
        said: dict[str, Any] = {"text": "", "ids": [], "logprobs": [], "finish": None, "usage": None}
        body = body | {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, headers=self.headers, timeout=120) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", lines[-2:]
        for line in lines[:-1]:
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            if event["usage"]:
                said["usage"] = [event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]]
            for choice in event["choices"]:
                said["text"] += choice["text"]
                said["ids"] += choice["token_ids"]
                said["logprobs"] += (choice["logprobs"] or {}).get("tokens", [])
                said["finish"] = choice["finish_reason"] or said["finish"]
        return said

    def metric(self, name: str) -> float:
        """Sum of a metric's samples."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] == name)

    # ---------------------------------------------------------------- looking into it

    def engine_pid(self) -> int:
        return next(pid for pid in descendants(self.process.pid) if b"quire.engine.process" in _cmdline(pid))

    def is_idle(self) -> bool:
        names = ("quire_num_requests_running", "quire_num_requests_waiting", "quire_kv_cache_usage_perc")
        return not any(self.metric(name) for name in names)

    def holdings(self) -> dict[str, int]:
        """What is counted and must come back: tasks, requests' objects, descriptors, threads, children."""
        self._window.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        wait_for(self._window.exists, SETTLE_SECONDS, "a look inside")
        seen: dict[str, int] = json.loads(self._window.read_text())
        for name, pid in (("server", self.process.pid), ("engine", self.engine_pid())):
            seen[f"{name} fds"] = len(os.listdir(f"/proc/{pid}/fd"))
            seen[f"{name} threads"] = len(os.listdir(f"/proc/{pid}/task"))
        seen["children"] = len(descendants(self.process.pid))
        return seen

    def at_rest(self) -> dict[str, int]:
        """`holdings`, when connections that were just closed are forgotten."""
        seen = self.holdings()
        end = time.monotonic() + SETTLE_SECONDS
        while (again := self.holdings()) != seen and time.monotonic() < end:
            seen = again
        return seen

    def rss(self) -> int:
        """Bytes of both processes."""
        pages = (Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in (self.process.pid, self.engine_pid()))
        return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")


def check_refusal(response: httpx.Response, what: object = None) -> None:
    """A typed 4xx in the one shape that all errors have, which tells nothing of the server's inside."""
    assert 400 <= response.status_code < 500, (what, response.status_code, response.text[:300])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, what
    assert error["message"], what
    assert error["code"], what
    check_tells_nothing(response, what)


def check_tells_nothing(response: httpx.Response, what: object = None) -> None:
    found = LEAKS.search(response.text)
    assert not found, (what, found, response.text[:300])
    assert not any(key in response.text for key in KEYS), what


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, from /proc."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found + [below for child in found for below in descendants(child)]


def _cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


class Victims:
    """The answers of two streams when they run alone, against which they are compared while something is done."""

    def __init__(self, house: House) -> None:
        self._house = house
        house.crowd()
        self._alone = [house.stream(body) for body in (GREEDY, SAMPLED)]
        assert [house.stream(body) for body in (GREEDY, SAMPLED)] == self._alone, "not even alone are they the same"
        self.ready_p99: float | None = None

    @contextlib.contextmanager
    def undisturbed(self, patience: float = SETTLE_SECONDS) -> Iterator[House]:
        """What happens inside changes no byte of the victims' streams, no engine, and leaves nothing behind.

        patience: seconds after which what has not been given back is lost.
        Raises AssertionError that says what was different.
        """
        house = self._house
        wait_for(house.is_idle, SETTLE_SECONDS, "idleness before")
        before, rss, engine = house.at_rest(), house.rss(), house.engine_pid()
        over = threading.Event()
        troubles: list[str] = []
        probes: list[float] = []
        threads = [
            *(threading.Thread(target=self._run, args=(i, over, troubles)) for i in range(2)),
            threading.Thread(target=self._probe, args=(over, probes, troubles)),
        ]
        for thread in threads:
            thread.start()
        try:
            yield house
        finally:
            over.set()
            for thread in threads:
                thread.join()
        self.ready_p99 = max(probes) if len(probes) < 100 else statistics.quantiles(probes, n=100)[-1]
        assert not troubles, "\n".join(troubles)
        assert self.ready_p99 < READY_SECONDS, f"/ready took {self.ready_p99:.1f} s"
        assert house.engine_pid() == engine, "the engine is another one"
        wait_for(house.is_idle, SETTLE_SECONDS, "idleness after")
        left: dict[str, str] = {}

        def is_back() -> bool:
            nonlocal left
            after = house.holdings()
            left = {name: f"{before[name]} -> {n}" for name, n in after.items() if n > before[name]}
            return not left

        try:
            wait_for(is_back, patience)
        except AssertionError:
            raise AssertionError(f"left behind: {left}") from None
        assert house.rss() - rss < RSS_BYTES, f"{(house.rss() - rss) >> 20} MiB more than before"

    def _run(self, which: int, over: threading.Event, troubles: list[str]) -> None:
        body, alone = (GREEDY, SAMPLED)[which], self._alone[which]
        while True:
            try:
                said = self._house.stream(body)
            except Exception as error:
                troubles.append(f"victim {which}: {type(error).__name__}: {error}")
                return
            if said != alone:
                fields = [name for name in alone if said[name] != alone[name]]
                troubles.append(f"victim {which} got another {', '.join(fields)} than alone")
                return
            if over.is_set():
                return

    def _probe(self, over: threading.Event, probes: list[float], troubles: list[str]) -> None:
        while not over.is_set():
            begin = time.monotonic()
            status = self._house.status("/ready")
            probes.append(time.monotonic() - begin)
            if status != 200:
                troubles.append(f"/ready said {status}")
                return
            over.wait(0.05)
