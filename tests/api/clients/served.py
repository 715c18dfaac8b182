"""A server as people start it, in processes of its own, on a tiny random model: what clients of other makers talk to.

The model says nothing sensible, so whatever has a form has it from the server: grammars of tools and schemas.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from conftest import make_tiny_model, write_byte_tokenizer
from process.conftest import Server

KEY = "right"


class Served(NamedTuple):
    url: str
    model: Path  # its folder


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """The model is called `tiny` and takes 4096 tokens, which are bytes; the server wants the key `right`."""
    model = make_tiny_model(folder / "tiny", max_position_embeddings=4096)
    write_byte_tokenizer(model)
    server = Server(model, folder / "server.log", "--api-key", KEY, "--tool-call-parser", "hermes", "--tokenizer-info")
    try:
        server.wait_until_ready()
        yield Served(server.url, model)
    finally:
        for pid in server.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()
