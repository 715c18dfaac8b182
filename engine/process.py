"""The engine as a process of its own, and the client that starts, feeds and watches it.

    API process                                  engine process (python -m quire.engine.process)
    ProcessClient ── stdin: configuration, then silence; its end means that the parent is gone ──▶ exit
      send() ──────── unix socket, PUSH → PULL: AddRequest, Abort, Shutdown ─────────────────────▶ run()
      receiver thread ◀── unix socket, PULL ← PUSH: EngineReady, StepOutputs, EngineDead ───────── run()
      receiver thread ◀── a pipe: the process has ended ──────────────────────────────────────────

Both sockets lie in a folder of mode 0700. No signal is part of the protocol: the engine ignores those that a terminal
sends to the whole group, and whoever started it decides when it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

import msgspec
import zmq

from .client import OnMessage
from .config import EngineConfig
from .errors import EngineDeadError, EngineStartError
from .messages import (
    Abort,
    AddRequest,
    Down,
    EngineDead,
    EngineReady,
    Shutdown,
    StepOutputs,
    Up,
    down_decoder,
    encoder,
    up_decoder,
)

log = logging.getLogger(__name__)

EXIT_SECONDS = 2.0  # an engine that was told to stop and has not by then is killed; a step takes less


class Launch(msgspec.Struct, frozen=True):
    """All that an engine process is told at its start."""

    folder: str
    log_level: int
    config: dict[str, object]


# ---------------------------------------------------------------- the API side


class ProcessClient:
    """An engine in a child process; see `client.EngineClient`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._dead: str | None = None
        self._last_news = -math.inf
        self._folder = tempfile.mkdtemp(prefix="quire-")
        self._context = zmq.Context()
        self._down = self._socket(zmq.PUSH, "down")
        self._down_lock = threading.Lock()  # a zmq socket serves one thread at a time, and anybody may send
        self._up = self._socket(zmq.PULL, "up")
        self._process: subprocess.Popen[bytes] | None = None
        self._receiver: threading.Thread | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, on_message: OnMessage) -> EngineReady:
        self._on_message = on_message
        launch = Launch(self._folder, log.getEffectiveLevel(), dataclasses.asdict(self._config))
        data = encoder.encode(launch)
        # -P: the working directory is not searched for modules, whatever lies there.
        command = [sys.executable, "-P", "-m", "quire.engine.process"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        self._exit = _ExitWatch(self._process)
        try:
            with contextlib.suppress(BrokenPipeError):
                self._stdin.write(len(data).to_bytes(4, "little") + data)
                self._stdin.flush()
            ready = self._await_ready()
        except BaseException:
            self._process.kill()
            self.close()
            raise
        self._receiver = threading.Thread(target=self._receive, name="engine-receiver", daemon=True)
        self._receiver.start()
        return ready

    def send(self, message: AddRequest | Abort) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        self._post(message)

    def heartbeat_age(self) -> float:
        return math.inf if self._dead is not None else time.monotonic() - self._last_news

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._process is not None:
            with contextlib.suppress(EngineDeadError, subprocess.TimeoutExpired):
                self._post(Shutdown())
                self._process.wait(EXIT_SECONDS)
            self._process.kill()
            self._process.wait()
            if self._receiver is not None:
                self._receiver.join()
            with contextlib.suppress(BrokenPipeError):
                self._stdin.close()
        self._dead = self._dead or "the engine was closed"
        self._down.close(linger=0)
        self._up.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process is not None
        assert self._process.stdin is not None
        return self._process.stdin

    def _post(self, message: Down) -> None:
        data = encoder.encode(message)
        try:
            with self._down_lock:
                self._down.send(data, zmq.NOBLOCK)
        except zmq.Again:  # no peer is left; with one, an unbounded queue never says this
            raise EngineDeadError("the engine process has gone") from None

    def _socket(self, kind: int, name: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set_hwm(0)  # what is in flight is bounded by admission, and blocking here would stop everybody
        socket.bind(f"ipc://{self._folder}/{name}")
        os.chmod(f"{self._folder}/{name}", 0o600)
        return socket

    def _await_ready(self) -> EngineReady:
        while (message := self._next()) is not None:
            if isinstance(message, EngineReady):
                return message
            if isinstance(message, EngineDead):
                raise EngineStartError(message.reason)
        raise EngineStartError(f"the engine process ended while it started ({self._exit.describe()})")

    def _receive(self) -> None:
        while (message := self._next()) is not None:
            if isinstance(message, StepOutputs):
                self._on_message(message)
            elif isinstance(message, EngineDead):
                self._die(message.reason)
        self._die(f"the engine process ended ({self._exit.describe()})")

    def _next(self) -> Up | None:
        """The engine's next message; None once it has ended and nothing is left to read."""
        poller = zmq.Poller()
        poller.register(self._up, zmq.POLLIN)
        poller.register(self._exit.fd, zmq.POLLIN)
        if self._up in dict(poller.poll()):
            self._last_news = time.monotonic()
            return up_decoder.decode(self._up.recv())
        return None

    def _die(self, reason: str) -> None:
        if self._dead is None and not self._closed:
            self._dead = reason
            log.error("engine: %s", reason)
            self._on_message(EngineDead(reason))


class _ExitWatch:
    """A file descriptor that becomes readable when a process ends: no timeout, on any Unix."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.fd, writing = os.pipe()

        def wait() -> None:
            process.wait()
            os.close(writing)

        threading.Thread(target=wait, name="engine-exit", daemon=True).start()

    def describe(self) -> str:
        code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def __del__(self) -> None:
        os.close(self.fd)


# ---------------------------------------------------------------- the engine side


def main() -> None:
    """Entry point of the engine process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    size = int.from_bytes(sys.stdin.buffer.read(4), "little")
    launch = msgspec.msgpack.decode(sys.stdin.buffer.read(size), type=Launch)
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    logging.basicConfig(level=launch.log_level, format="%(asctime)s %(levelname)s engine: %(message)s")

    context = zmq.Context()
    down, up = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    up.set_hwm(0)
    down.connect(f"ipc://{launch.folder}/down")
    up.connect(f"ipc://{launch.folder}/up")

    def send(message: Up) -> None:
        up.send(encoder.encode(message))

    def receive(seconds: float) -> list[Down]:
        messages: list[Down] = []
        if down.poll(int(1000 * seconds)):
            with contextlib.suppress(zmq.Again):
                while True:
                    messages.append(down_decoder.decode(down.recv(zmq.NOBLOCK)))
        return messages

    code = 0
    try:
        # Here, not above: the API side imports this module for its client, and needs no torch.
        from .core import EngineCore, run

        core = EngineCore(EngineConfig(**launch.config))  # type: ignore[arg-type]
        send(core.ready)
        run(core, receive, send)
    except EngineStartError as error:
        code = 1
        send(EngineDead(str(error)))
    except BaseException as error:
        code = 1
        log.exception("the engine cannot go on")
        send(EngineDead(f"{type(error).__name__}; the engine's log has the details"))
    up.close(linger=1000)
    down.close(linger=0)
    context.term()
    # Without the interpreter's teardown: threads of native libraries may outlive their modules there.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_with_parent() -> None:
    """The pipe closes when the parent ends, however it ends: no orphan keeps memory or a GPU."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
