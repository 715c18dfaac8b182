"""What the first rank tells the others: typed msgpack over a socket (framing.py).

down  RankLaunch (once, before all else)  Rehearse  Run  Collect  Prepare  Release, in the order in which the first rank
      does the same
up    Met (it is about to connect), Failed (why it ends)

The end of the socket is the end of the engine.
"""

from __future__ import annotations

import socket
import zlib

import msgspec

from ..scheduler.params import Grammar
from ..scheduler.plan import Row, StepPlan, StepResult
from . import framing
from .config import EngineConfig
from .resolve import Machine


class RankLaunch(msgspec.Struct, frozen=True):
    """All that a rank is told at its start."""

    config: EngineConfig
    machine: Machine  # as the first rank found it
    rank: int
    meeting: str  # the file by which ranks find each other
    log_level: int
    parent: int  # the process that it must not outlive


class Rehearse(msgspec.Struct, frozen=True, tag="rehearse"):
    """Run these rows on the null block, and wait for them."""

    rows: list[Row]


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Launch a step."""

    plan: StepPlan


class Collect(msgspec.Struct, frozen=True, tag="collect"):
    """Wait for the step that was launched first. checksum: of what the first rank drew, which all must have drawn."""

    checksum: int


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """A request has come that needs this grammar: compile it beside the loop."""

    grammar: Grammar


class Release(msgspec.Struct, frozen=True, tag="release"):
    """One that needed it has ended."""

    grammar: Grammar


class Met(msgspec.Struct, frozen=True, tag="met"):
    pass


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    reason: str


Order = Rehearse | Run | Collect | Prepare | Release
Answer = Met | Failed

_encoder = msgspec.msgpack.Encoder()
launch_decoder: msgspec.msgpack.Decoder[RankLaunch] = msgspec.msgpack.Decoder(RankLaunch)
order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
answer_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def frame(message: RankLaunch | Order | Answer) -> bytes:
    return framing.frame(_encoder.encode(message))


def receive(channel: socket.socket) -> bytes | None:
    """The next message; None where the other side has gone."""
    try:
        return framing.receive(channel)
    except (EOFError, ConnectionError):
        return None


def checksum(result: StepResult) -> int:
    """Of every token that a step drew, and of every row that failed."""
    drawn = [(row.token_ids, row.error is not None) for row in (*result.rows, *result.draws)]
    return zlib.crc32(_encoder.encode(drawn))
