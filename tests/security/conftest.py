"""The fixture that every attack ends with: `victim` gives the server to attack, and judges when the test is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from security.house import House, Victims


@pytest.fixture(scope="session")
def house(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One server for all attacks: a test that leaves something behind must not hide behind a fresh start."""
    server = House(tiny_model, tmp_path_factory.mktemp("house"), "--max-num-seqs", "8", "--max-body-bytes", "2MiB")
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def victims(house: House) -> Victims:
    return Victims(house)


@pytest.fixture
def victim(victims: Victims, record_property: Callable[[str, object], None]) -> Iterator[House]:
    """The server, beside two streams whose bytes must not change and whose server must be as it was in the end."""
    with victims.undisturbed() as house:
        yield house
    record_property("ready_p99_seconds", victims.ready_p99)
