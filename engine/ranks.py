"""The other ranks of an engine, as the first one sees them: started, told what to do, watched, ended.

    rank 0: the engine's process                    rank n (engine/rank.py)
      RankLaunch, then the orders ── a socket pair ─────────▶ the same on its part of the model
      stdin: silence; its end means that the engine is gone ──▶ exit
                 ◀── sums and joined columns: torch.distributed ──▶

A rank lives no longer than the thread that started it (lifeline.py), and the engine no longer than its ranks.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..scheduler.params import Grammar
from ..scheduler.plan import Row, StepPlan, StepResult
from .config import EngineConfig
from .errors import EngineStartError, RankLost
from .lifeline import ending
from .orders import (
    Collect,
    Failed,
    Order,
    Prepare,
    RankLaunch,
    Rehearse,
    Release,
    Run,
    answer_decoder,
    checksum,
    frame,
    receive,
)
from .parallel import ALONE, Alone, connect
from .resolve import Machine, Resolved

log = logging.getLogger(__name__)

EXIT_SECONDS = 2.0  # a rank that was told to stop and has not by then is killed
WORDS_SECONDS = 5.0  # for a rank that is lost to say why: less than it takes to notice that an engine hangs


@dataclasses.dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    channel: socket.socket

    def answer(self) -> str | None:
        """Why it failed, or None once it is ready to meet the others. Waits for either."""
        data = receive(self.channel)
        if data is None:
            return f"ended ({self.end()})"
        answer = answer_decoder.decode(data)
        return answer.reason if isinstance(answer, Failed) else None

    def end(self) -> str:
        return ending(self.process.wait())


class Ranks:
    """None of them, until `meet` starts those that the settings ask for."""

    def __init__(self, config: EngineConfig, machine: Machine) -> None:
        self._config, self._machine = config, machine
        self._ranks: list[_Rank] = []

    def meet(self, settings: Resolved) -> Alone:
        """Start the other ranks, and wait for them. Raises EngineStartError, with the reason of one that cannot be."""
        if settings.tensor_parallel_size == 1:
            return ALONE
        folder = Path(tempfile.mkdtemp(prefix="quire-ranks-"))
        try:
            meeting = folder / "meeting"
            for number in range(1, settings.tensor_parallel_size):
                self._ranks.append(_start(number))
                self._post(self._ranks[-1], frame(self._launch(number, meeting)))
            for rank in self._ranks:
                why = rank.answer()
                if why is not None:
                    raise EngineStartError(f"rank {rank.number}: {why}")
            return connect(meeting, 0, settings.tensor_parallel_size, settings.device, self.check)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # What they are told, when this rank is about to do the same. Raises RankLost where one has gone.

    def rehearse(self, rows: list[Row]) -> None:
        if self._ranks:
            self._tell(Rehearse(rows))

    def launch(self, plan: StepPlan) -> None:
        if self._ranks:
            self._tell(Run(plan))

    def collect(self, result: StepResult) -> None:
        """result: what this rank has collected."""
        if self._ranks:
            self._tell(Collect(checksum(result)))

    def prepare(self, grammar: Grammar) -> None:
        if self._ranks:
            self._tell(Prepare(grammar))

    def release(self, grammar: Grammar) -> None:
        if self._ranks:
            self._tell(Release(grammar))

    def _tell(self, order: Order) -> None:
        data = frame(order)
        for rank in self._ranks:
            self._post(rank, data)

    # Their ends.

    def check(self) -> None:
        """Raises RankLost where one has ended."""
        if any(rank.process.poll() is not None for rank in self._ranks):
            raise RankLost("a rank has ended")

    def last_words(self) -> str:
        """Of the rank that is lost, why."""
        end = time.monotonic() + WORDS_SECONDS
        while time.monotonic() < end:
            for rank in self._ranks:
                if rank.process.poll() is not None:
                    return f"rank {rank.number}: {rank.answer() or rank.end()}"
            time.sleep(0.01)
        return "a rank is lost, and none has ended"

    def close(self) -> None:
        """End them all, and wait until they have."""
        for rank in self._ranks:
            rank.channel.close()
        for rank in self._ranks:
            try:
                rank.process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
            if rank.process.stdin is not None:
                rank.process.stdin.close()
        self._ranks = []

    def _launch(self, number: int, meeting: Path) -> RankLaunch:
        return RankLaunch(
            config=self._config,
            machine=self._machine,
            rank=number,
            meeting=str(meeting),
            log_level=log.getEffectiveLevel(),
            parent=os.getpid(),
        )

    def _post(self, rank: _Rank, data: bytes) -> None:
        try:
            rank.channel.sendall(data)
        except OSError:
            raise RankLost("a rank does not listen") from None


def _start(number: int) -> _Rank:
    """The caller's thread is the one that it lives with."""
    own, its = socket.socketpair()
    with its:
        # -P: the working directory is not searched for modules, whatever lies there.
        command = [sys.executable, "-P", "-m", "quire.engine.rank", str(its.fileno())]
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[its.fileno()])
        except OSError as error:
            own.close()
            raise EngineStartError(f"no process can be started: {error}") from None
    return _Rank(number, process, own)
