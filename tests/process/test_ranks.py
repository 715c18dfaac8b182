"""A server whose engine is two processes: they answer as one, end as one, and nothing of them is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from process.test_life import GREEDY, alive, complete, text

from quire import LLM, SamplingParams

TWO = ("--tensor-parallel-size", "2")


def ranks_of(server) -> list[int]:
    """The processes of ranks other than the first."""
    return [pid for pid in server.family() if b"quire.engine.rank" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def gone(server, pids: list[int]) -> None:
    server.wait_for(lambda: not any(map(alive, pids)), 60)


def test_two_ranks_answer_as_one_and_end_as_one(tiny_model: Path, start_server) -> None:
    with LLM(str(tiny_model), dtype="float32", threads=1) as llm:
        params = SamplingParams(max_tokens=GREEDY["max_tokens"], temperature=0.0, ignore_eos=True)
        expected = llm.generate([GREEDY["prompt"]], params)[0].outputs[0].text
    server = start_server(*TWO)
    assert text(complete(server)) == expected
    (rank,) = ranks_of(server)
    engine = server.engine_pid()

    os.kill(rank, signal.SIGKILL)  # while idle
    gone(server, [rank, engine])
    server.wait_for(lambda: server.status("/ready") == 200, 120)
    (second,) = ranks_of(server)
    assert second != rank
    assert text(complete(server)) == expected
    assert "rank 1: ended (killed by SIGKILL)" in server.log.read_text()
    assert server.metric("quire_engine_restarts_total") == 1

    os.kill(server.engine_pid(), signal.SIGKILL)
    gone(server, [second])
    family = server.family()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    gone(server, family)
    assert list(server.temporary.iterdir()) == []


def test_a_size_that_does_not_divide_the_heads_is_refused_in_a_line(launch_server) -> None:
    server = launch_server("--tensor-parallel-size", "3")
    assert server.process.wait(120) == 2
    time.sleep(0.1)
    lines = [line for line in server.log.read_text().splitlines() if "tensor_parallel_size is 3" in line]
    assert lines, server.log.read_text()
    assert "choose 1, 2, 4" in lines[0]
    assert server.family() == [server.process.pid]
