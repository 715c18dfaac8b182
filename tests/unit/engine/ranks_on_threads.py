"""Ranks as threads of the test's own process: they meet over gloo as processes do, and start in no time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from quire.engine import ranks
from quire.engine.orders import Failed, frame, launch_decoder, receive
from quire.engine.parallel import Group, connect
from quire.engine.rank import take_part


def groups(folder: Path, size: int) -> list[Group]:
    """All ranks of one group."""
    with ThreadPoolExecutor(size) as pool:
        meeting = folder / f"meeting{size}"
        return list(pool.map(lambda number: connect(meeting, number, size, torch.device("cpu")), range(size)))


def together(size: int, function: Callable[[int], Any]) -> list[Any]:
    """function(rank), on all ranks at once."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(torch.inference_mode()(function), range(size)))


class RankThread:
    """As much of a process as `ranks.py` asks of one."""

    stdin = None

    def __init__(self, channel: socket.socket) -> None:
        self.code: int | None = None
        self._channel = channel
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        code = 1
        try:
            data = receive(self._channel)
            assert data is not None
            take_part(launch_decoder.decode(data), self._channel)
            code = 0
        except BaseException as error:
            self._channel.sendall(frame(Failed(f"{type(error).__name__}: {error}")))
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def wait(self, seconds: float | None = None) -> int:
        self._thread.join(seconds)
        assert self.code is not None
        return self.code


def start(number: int) -> ranks._Rank:
    """In place of `ranks._start`."""
    own, its = socket.socketpair()
    process: Any = RankThread(its)
    return ranks._Rank(number, process, own)
