"""Messages over a socket arrive whole or not at all; and how a process ended is said in words."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from quire.engine import orders
from quire.engine.framing import LENGTH_BYTES, PART_BYTES, frame, receive
from quire.engine.lifeline import ending

PAST = float("-inf")  # a deadline


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_messages_arrive_one_by_one(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    sent = [b"", b"a", bytes(range(256)) * (3 * PART_BYTES // 256) + b"and more"]
    sender = threading.Thread(target=lambda: [one.sendall(frame(message)) for message in sent])
    sender.start()
    assert [receive(other) for _ in sent] == sent
    sender.join()


@pytest.mark.parametrize("said", [0, LENGTH_BYTES - 1, LENGTH_BYTES, LENGTH_BYTES + 3])
def test_who_closes_before_the_end_of_a_message_has_said_nothing(pair, said: int) -> None:
    one, other = pair
    one.sendall(frame(b"hello")[:said])
    one.close()
    with pytest.raises(EOFError, match="closed"):
        receive(other)


def test_a_message_may_not_be_longer_than_its_limit(pair) -> None:
    one, other = pair
    one.sendall(frame(b"123") + frame(b"1234"))
    assert receive(other, limit=3) == b"123"
    with pytest.raises(EOFError, match="4 bytes"):
        receive(other, limit=3)


def test_nothing_is_taken_for_what_is_announced_and_does_not_come(pair) -> None:
    one, other = pair
    one.sendall((1 << 62).to_bytes(LENGTH_BYTES, "big"))
    one.close()
    with pytest.raises(EOFError, match="closed"):
        receive(other)


def test_a_deadline_ends_the_wait(pair) -> None:
    _, other = pair
    with pytest.raises(TimeoutError):
        receive(other, deadline=PAST)


def test_a_rank_hears_of_the_end_of_the_other_side(pair) -> None:
    one, other = pair
    one.sendall(orders.frame(orders.Met()))
    one.close()
    data = orders.receive(other)
    assert data is not None
    assert orders.answer_decoder.decode(data) == orders.Met()
    assert orders.receive(other) is None


def test_a_connection_that_breaks_is_an_end_to_ranks(pair) -> None:
    one, other = pair
    other.sendall(b"unread")
    one.close()  # with something unread: the other side sees a reset
    assert orders.receive(other) is None


@pytest.mark.parametrize(
    ("code", "words"),
    [("raise SystemExit(3)", "exit code 3"), ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL")],
)
def test_how_a_process_ended(code: str, words: str) -> None:
    assert ending(subprocess.run([sys.executable, "-S", "-c", code], check=False).returncode) == words
