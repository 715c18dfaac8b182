"""Life and death of a server's processes: whatever is killed, stopped or told to end, it ends as promised."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import queue
import random
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from quire.engine.config import EngineConfig
from quire.engine.messages import EngineReady
from quire.engine.process import ProcessClient
from quire.engine.supervisor import Supervisor

GREEDY = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
PRIVATE = {0o700 | stat.S_IFDIR, 0o600 | stat.S_IFSOCK}
ENDLESS = {"prompt": "x", "max_tokens": 400, "n": 8, "temperature": 1.0, "ignore_eos": True}  # seconds


def alive(pid: int) -> bool:
    """Runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def complete(server: Any, **changes: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=GREEDY | changes, timeout=120)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


class Streams:
    """Requests that stream on threads; the data lines of each."""

    def __init__(self, server: Any, count: int, **body: object) -> None:
        self.lines: list[list[str]] = [[] for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._read, args=(server, lines, body | {"stream": True})) for lines in self.lines
        ]
        for thread in self._threads:
            thread.start()
        server.wait_for(lambda: all(self.lines), 60)

    def _read(self, server: Any, lines: list[str], body: dict[str, object]) -> None:
        try:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
                lines += (line for line in response.iter_lines() if line.startswith("data: "))
        except httpx.TransportError as error:
            lines.append(type(error).__name__)

    def join(self) -> list[list[str]]:
        for thread in self._threads:
            thread.join(120)
        return self.lines


def codes(streams: list[list[str]]) -> set[str]:
    """The error codes that the streams ended with; "" for one that came to its end. None ends in silence."""
    assert [lines[-1] for lines in streams] == ["data: [DONE]"] * len(streams)
    return {json.loads(lines[-2].removeprefix("data: ")).get("error", {}).get("code", "") for lines in streams}


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def wait_for_another_engine(server: Any, pid: int) -> None:
    server.wait_for(lambda: server.status("/ready") == 200 and server.engine_pids() not in ([], [pid]), 120)


def test_an_engine_that_is_killed_or_hangs_is_replaced_and_given_up_in_the_end(start_server: Callable[..., Any]):
    server = start_server("--hang-timeout", "3", "--max-engine-restarts", "2", "--max-num-seqs", "32")
    family = server.family()
    expected = text(complete(server))
    pid, steps = server.engine_pid(), server.metric("quire_engine_steps_total")
    streams = Streams(server, 4, **ENDLESS)
    drawn = server.metric("quire_engine_generated_tokens_total")
    kill(pid)
    assert codes(streams.join()) == {"engine_dead"}
    assert server.status("/live") == 200
    refused = complete(server)
    if refused.status_code != 200:  # unless the new one is up already
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] in ("engine_dead", "engine_starting")
        assert int(refused.headers["retry-after"]) >= 1
    wait_for_another_engine(server, pid)
    assert text(complete(server)) == expected
    assert server.metric("quire_engine_steps_total") > steps
    assert server.metric("quire_engine_generated_tokens_total") > drawn
    assert server.metric("quire_num_requests_running") == 0

    pid = server.engine_pid()
    family += server.family()
    streams = Streams(server, 2, **ENDLESS)
    os.kill(pid, signal.SIGSTOP)
    server.wait_for(lambda: server.status("/ready") == 503, 60)
    assert codes(streams.join()) == {"engine_dead"}
    wait_for_another_engine(server, pid)
    assert text(complete(server)) == expected
    assert server.metric("quire_engine_hung_total") == 1
    page = httpx.get(f"{server.url}/metrics", timeout=10).text
    for reason, count in (("crash", 1), ("hang", 1), ("start", 0)):
        assert f'quire_engine_restarts_total{{reason="{reason}"}} {count}.0' in page

    family += server.family()
    kill(server.engine_pid())
    assert server.process.wait(60) == 1
    assert "given up" in server.log.read_text()
    server.wait_for(lambda: not any(alive(pid) for pid in family))
    assert list(server.temporary.iterdir()) == []


def test_sockets_that_do_not_close_hold_up_no_new_engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """As libzmq's may not, of an engine that was killed while it spoke."""
    opened, term = threading.Event(), zmq.Context.term

    def late(context: zmq.Context) -> None:
        opened.wait(120)
        term(context)

    monkeypatch.setattr(zmq.Context, "term", late)
    config = EngineConfig(model=str(tiny_model), dtype="float32", threads=1, max_model_len=96)
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine = Supervisor(ProcessClient, config, hang_timeout=30.0, max_restarts=1)
    engine.start(said.put)
    try:
        os.kill(engine._client.pid, signal.SIGKILL)
        while not isinstance(said.get(timeout=60), EngineReady):
            pass
        engine.close()
    finally:
        opened.set()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_line(launch_server, tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096])
    server = launch_server(model=folder)
    assert server.process.wait(120) == 1
    log = server.log.read_text()
    assert log.count("cannot start") == 1
    assert "Traceback" not in log
    assert list(server.temporary.iterdir()) == []


def test_nothing_survives_a_server_that_is_killed_while_its_engine_loads(launch_server: Callable[..., Any]):
    """The kernel holds the cord by then: the sockets are gone a moment after it was tied."""
    server = launch_server()
    server.wait_for(lambda: bool(modes(server.temporary)), 60)
    server.wait_for(lambda: not modes(server.temporary), 60)
    kill_the_server(server)


@pytest.mark.slow
def test_nothing_survives_a_hundred_servers_that_are_killed(launch_server: Callable[..., Any]):
    """Whatever the engine is at: coming to life, importing, loading, serving."""
    rng = random.Random(7)
    for i in range(100):
        server = launch_server()
        server.wait_for(lambda server=server: bool(server.engine_pids()), 60)
        if i % 4 == 0:
            server.wait_until_ready()
        else:
            time.sleep(4 * rng.random())
        kill_the_server(server)


def kill_the_server(server: Any) -> None:
    family = server.family()
    server.process.kill()
    server.process.wait()
    server.wait_for(lambda: not any(alive(pid) for pid in family), 60)
    server.wait_for(lambda: list(server.temporary.iterdir()) == [])


@pytest.mark.parametrize("moment", ["starting", pytest.param("serving", marks=pytest.mark.slow), "busy"])
def test_signals_in_a_row_are_one_clean_end(launch_server: Callable[..., Any], moment: str):
    server = launch_server()
    server.wait_for(lambda: bool(server.engine_pids()), 60)
    streams = None
    if moment != "starting":
        server.wait_until_ready()
        if moment == "busy":
            streams = Streams(server, 2, **ENDLESS)
    family = server.family()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        if server.process.poll() is None:
            server.process.send_signal(number)
        time.sleep(0.1)
    assert server.process.wait(60) == 0, server.log.read_text()
    server.wait_for(lambda: not any(alive(pid) for pid in family))
    assert list(server.temporary.iterdir()) == []
    assert "Traceback" not in server.log.read_text()
    if streams is not None:
        assert codes(streams.join()) == {"server_draining"}


def test_a_drain_finishes_every_stream_and_refuses_the_next(start_server: Callable[..., Any]):
    drain(start_server("--max-num-seqs", "64"), 8)


@pytest.mark.slow
def test_a_drain_finishes_fifty_streams(start_server: Callable[..., Any]):
    drain(start_server("--max-num-seqs", "64", "--drain-timeout", "120"), 50)


def drain(server: Any, count: int) -> None:
    streams = Streams(server, count, **(GREEDY | {"max_tokens": 400}))
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.status("/ready") in (503, None))
    try:
        refused = complete(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
        assert int(refused.headers["retry-after"]) >= 1
    except httpx.TransportError:
        pass  # all streams were at their end
    lines = streams.join()
    assert codes(lines) == {""}
    assert len({tuple(events) for events in map(texts, lines)}) == 1
    assert server.process.wait(60) == 0


def texts(lines: list[str]) -> list[str]:
    """What a stream said, in one piece."""
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return ["".join(choice["text"] for event in events for choice in event["choices"])]


@pytest.mark.slow
def test_a_drain_that_takes_too_long_ends_streams_with_an_error(start_server: Callable[..., Any]):
    server = start_server("--drain-timeout", "0.2")
    streams = Streams(server, 3, **ENDLESS)
    server.process.send_signal(signal.SIGTERM)
    assert codes(streams.join()) == {"server_draining"}
    assert server.process.wait(60) == 0


def test_a_port_can_be_had_again_after_each_kill(launch_server: Callable[..., Any]):
    live_and_die(launch_server, cycles=2, requests=5)


@pytest.mark.slow
def test_a_port_can_be_had_again_after_fifty_kills(launch_server: Callable[..., Any]):
    live_and_die(launch_server, cycles=50, requests=500)


def modes(folder: Path) -> set[int]:
    """Of all that lies in it, as far as it is still there."""
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found.add(path.lstat().st_mode)
    return found


def live_and_die(launch_server: Callable[..., Any], cycles: int, requests: int) -> None:
    """Kill the server in the middle of its work; the next one on the same port finds nothing in its way."""
    port = None
    for _ in range(cycles):
        server = launch_server(port=port)
        port = server.port
        server.wait_for(lambda server=server: len(modes(server.temporary)) > 1, 60)
        server.wait_for(lambda server=server: modes(server.temporary) <= PRIVATE, 60)
        server.wait_until_ready()
        assert list(server.temporary.iterdir()) == [], "sockets can be reached though both sides are connected"
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(complete, server, max_tokens=2) for _ in range(requests)]
        assert len({text(answer.result()) for answer in answers}) == 1
        streams = Streams(server, 2, **ENDLESS)
        family = server.family()
        server.process.kill()
        server.process.wait()
        streams.join()
        server.wait_for(lambda family=family: not any(alive(pid) for pid in family), 60)
        assert list(server.temporary.iterdir()) == []
