"""The scripted engine behind a real port, for clients that bring their own HTTP."""

from __future__ import annotations

import threading
import time

import pytest
import uvicorn

from quire.server.app import create_app
from quire.server.config import ServerConfig
from quire.server.http_protocol import BoundedProtocol

KEY = "right"


@pytest.fixture
def url(fake):
    """Where a server listens that wants the key `right`; its model thinks, and has room for tools."""
    fake.facts = {"max_model_len": 4096}
    app = create_app(fake, ServerConfig(api_key=(KEY,), reasoning_parser="qwen3"))
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, lifespan="on", http=BoundedProtocol, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def until():
    """Wait for a condition; generous, because the machine may be busy."""

    def wait(condition, seconds=60.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.01)

    return wait
