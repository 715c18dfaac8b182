"""A rank of an engine that is not its first: it does to its part of the model what the first one does to its own.

    orders ─▶ Rehearse ─▶ runner.rehearse      Run ─▶ runner.launch      Collect ─▶ runner.collect, and compare
              Prepare, Release ─▶ grammars, compiled beside this loop as beside the first rank's

It draws every token itself, of the same logits by the same noise. Whatever goes wrong here ends it, and with it the
engine: the others could only wait for it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from .assemble import assemble
from .errors import EngineStartError, RankLost
from .grammar import Grammars
from .lifeline import die_with_parent, exit_at_end_of
from .orders import (
    Collect,
    Failed,
    Met,
    Order,
    Prepare,
    RankLaunch,
    Rehearse,
    Release,
    checksum,
    frame,
    launch_decoder,
    order_decoder,
    receive,
)
from .parallel import Alone, connect
from .recorded import share_threads
from .resolve import Resolved
from .runner import Launched, ModelRunner
from .startup import Startup

log = logging.getLogger(__name__)


def main(channel: socket.socket) -> None:
    """Entry point of the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    exit_at_end_of(sys.stdin.buffer, lambda: None)
    data = receive(channel)
    if data is None:
        return
    launch = launch_decoder.decode(data)
    logging.basicConfig(
        level=launch.log_level, format=f"%(asctime)s %(levelname)s engine, rank {launch.rank}: %(message)s"
    )
    code = 0
    try:
        die_with_parent(launch.parent)
        take_part(launch, channel)
    except (EngineStartError, RankLost) as error:
        code = 1
        _say(channel, str(error))
    except BaseException as error:
        code = 1
        log.exception("the rank cannot go on")
        _say(channel, f"{type(error).__name__}: {error}")
    # Without the interpreter's teardown: threads of native libraries may outlive their modules there.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def take_part(launch: RankLaunch, channel: socket.socket) -> None:
    """Load this rank's part, and carry out orders until there are no more.

    Raises EngineStartError, and RankLost where another rank has gone or has drawn other tokens.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.rank)

    def meet(settings: Resolved) -> Alone:
        channel.sendall(frame(Met()))
        return connect(Path(launch.meeting), launch.rank, settings.tensor_parallel_size, settings.device)

    made = assemble(launch.config, launch.machine, meet, Startup())
    share_threads(made.runner.decoder, made.settings.threads)
    follow(made.runner, made.grammars, _orders(channel), launch.rank)


def follow(runner: ModelRunner, grammars: Grammars, orders: Iterator[Order], rank: int) -> None:
    """Carry out orders until there are no more. Raises RankLost when what is drawn differs from the first rank's."""
    out: deque[Launched] = deque()
    for order in orders:
        if isinstance(order, Rehearse):
            runner.rehearse(order.rows)
        elif isinstance(order, Collect):
            if checksum(runner.collect(out.popleft())) != order.checksum:
                raise RankLost(f"rank {rank} has drawn other tokens than the first one")
        elif isinstance(order, Prepare):
            grammars.prepare(order.grammar)
        elif isinstance(order, Release):
            grammars.release(order.grammar)
        else:
            out.append(runner.launch(order.plan))


def _orders(channel: socket.socket) -> Iterator[Order]:
    while (data := receive(channel)) is not None:
        yield order_decoder.decode(data)


def _say(channel: socket.socket, reason: str) -> None:
    """The engine's last words are these, if it still listens."""
    try:
        channel.sendall(frame(Failed(reason)))
    except OSError:
        log.error("%s", reason)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
