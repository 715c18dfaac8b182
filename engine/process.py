"""The engine as a process of its own, and the client that starts, feeds and watches it.

    API process                                  engine process (python -m quire.engine.process FOLDER)
    ProcessClient ── stdin: silence; its end means that the parent is gone ────────────────────────▶ exit
      send() ──────── unix socket, PUSH → PULL: Launch, AddRequest, Abort, Watch, Shutdown ─────────▶ run()
      receiver thread ◀── unix socket, PULL ← PUSH: Progress, EngineReady, StepOutputs, EngineDead ── run()
      receiver thread ◀── a pipe: the process has ended ─────────────────────────────────────────────

Both sockets lie in a folder of mode 0700 until the two sides are connected, and then nowhere: whatever is killed later
leaves nothing behind. No signal is part of the protocol: the engine ignores those that a terminal sends to the whole
group, and whoever started it decides when it ends.
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

import msgspec
import zmq

from .client import Heartbeat, OnMessage
from .config import EngineConfig
from .errors import EngineDeadError, EngineStartError, RankLost, SettingError
from .lifeline import die_with_parent, ending, exit_at_end_of
from .messages import (
    Abort,
    AddRequest,
    Busy,
    Down,
    EngineDead,
    EngineReady,
    Launch,
    Progress,
    Shutdown,
    StepOutputs,
    Up,
    Watch,
    down_decoder,
    encoder,
    up_decoder,
)
from .startup import Startup

log = logging.getLogger(__name__)

EXIT_SECONDS = 2.0  # an engine that was told to stop and has not by then is killed; a step takes less
TERM_SECONDS = 1.0  # sockets whose peer has gone close in some 0.6 ms, at most 3 (8 times)
KILL_SECONDS = 10.0  # a killed process that has not ended by then is stuck in the kernel: nobody waits for it


# ---------------------------------------------------------------- the API side


class ProcessClient:
    """An engine in a child process; see `client.EngineClient`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._dead: str | None = None
        self._heartbeat = Heartbeat()
        self._child: _Child | None = None
        self._receiver: threading.Thread | None = None
        self._killed = self._closed = False
        self._opening = threading.RLock()  # held while the engine starts: sockets may not be closed under it
        self._down_lock = threading.Lock()  # a zmq socket serves one thread at a time, and anybody may send
        self._folder: str | None = None

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    def start(self, on_message: OnMessage) -> EngineReady:
        self._on_message = on_message
        with self._opening:
            if self._closed:
                raise EngineStartError("the engine was closed before it started")
            self._open_sockets()
            try:
                # -P: the working directory is not searched for modules, whatever lies there.
                self._child = _Child([sys.executable, "-P", "-m", "quire.engine.process", str(self._folder)])
                if self._killed:
                    self._child.kill()
                self._launch()
                ready = self._await_ready()
            except BaseException:
                self.kill()
                self.close()
                raise
            self._receiver = threading.Thread(target=self._receive, name="engine-receiver", daemon=True)
            self._receiver.start()
            return ready

    def send(self, message: AddRequest | Abort | Watch) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        self._post(message)

    def heartbeat_age(self) -> float:
        return math.inf if self._dead is not None else self._heartbeat.age()

    def kill(self) -> None:
        self._killed = True
        if self._child is not None:
            self._child.kill()

    def close(self) -> None:
        if self._receiver is None:
            self.kill()  # ends a start that another thread is waiting for
        with self._opening:
            if not self._closed:
                self._closed = True
                self._close()

    def _close(self) -> None:
        if self._child is not None:
            if not self._killed:
                with contextlib.suppress(EngineDeadError):
                    self._post(Shutdown())
                self._child.wait(EXIT_SECONDS)
            self._child.kill()
            if not self._child.wait(KILL_SECONDS):
                log.error("engine process %d was killed and does not end: it is left to the kernel", self._child.pid)
            elif self._receiver is not None:
                self._receiver.join()
            self._child.release()
        self._dead = self._dead or "the engine was closed"
        if self._folder is not None:
            self._down.close(linger=0)
            self._up.close(linger=0)
            _end(self._context)
            self._forget_folder()

    def _open_sockets(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="quire-")
        self._context = zmq.Context()
        self._down, self._up = self._socket(zmq.PUSH, "down"), self._socket(zmq.PULL, "up")

    def _socket(self, kind: int, name: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set_hwm(0)  # what is in flight is bounded by admission, and blocking here would stop everybody
        socket.bind(f"ipc://{self._folder}/{name}")
        os.chmod(f"{self._folder}/{name}", 0o600)
        return socket

    def _forget_folder(self) -> None:
        shutil.rmtree(str(self._folder), ignore_errors=True)

    def _post(self, message: Down | Launch) -> None:
        data = encoder.encode(message)
        try:
            with self._down_lock:
                self._down.send(data, zmq.NOBLOCK)
        except zmq.Again:  # no peer is left; with one, an unbounded queue never says this
            raise EngineDeadError("the engine process has gone") from None

    def _launch(self) -> None:
        """Wait until the engine listens, and tell it what it is to be; nothing, if it ends before."""
        assert self._child is not None
        poller = zmq.Poller()
        poller.register(self._down, zmq.POLLOUT)
        poller.register(self._child.fd, zmq.POLLIN)
        if self._down in dict(poller.poll()):
            self._post(Launch(dataclasses.asdict(self._config), log.getEffectiveLevel(), os.getpid()))

    def _await_ready(self) -> EngineReady:
        while (message := self._next()) is not None:
            self._forget_folder()  # it has answered the launch, so both sockets are connected
            if isinstance(message, EngineReady):
                return message
            if isinstance(message, EngineDead):
                raise (SettingError if message.kind == "setting" else EngineStartError)(message.reason)
            if isinstance(message, Progress):
                self._on_message(message)
        raise EngineStartError(f"the engine process ended while it started ({self._exit_code()})")

    def _receive(self) -> None:
        try:
            while (message := self._next()) is not None:
                if isinstance(message, StepOutputs):
                    self._on_message(message)
                elif isinstance(message, EngineDead):
                    self._die(message.reason)
            self._die(f"the engine process ended ({self._exit_code()})")
        except Exception as error:  # nobody hears the engine any more: it is as good as dead
            log.exception("the engine's messages cannot be read")
            self._die(f"its messages cannot be read: {type(error).__name__}")
            self.kill()

    def _next(self) -> Up | None:
        """The engine's next message; None once it has ended and nothing is left to read."""
        assert self._child is not None
        poller = zmq.Poller()
        poller.register(self._up, zmq.POLLIN)
        poller.register(self._child.fd, zmq.POLLIN)
        if self._up in dict(poller.poll()):
            message = up_decoder.decode(self._up.recv())
            self._heartbeat.beat(message.seconds if isinstance(message, Busy) else 0.0)
            return message
        return None

    def _exit_code(self) -> str:
        assert self._child is not None
        return self._child.describe()

    def _die(self, reason: str) -> None:
        if self._dead is None and not self._closed:
            self._dead = reason
            log.error("engine: %s", reason)
            self._on_message(EngineDead(reason))


def _end(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Give its threads and descriptors back. libzmq 4.3.5 may wait for a killed peer for ever (one time of some 900
    that it was killed while both sent): nobody waits along, least of all whoever is to start the next engine.
    """
    closing = threading.Thread(target=context.term, name="engine-sockets", daemon=True)
    closing.start()
    closing.join(TERM_SECONDS)
    if closing.is_alive():
        log.warning("the sockets of the engine that ended do not close: they are left to the end of this process")


class _Child:
    """A process, started and awaited on a thread that lives exactly as long as it does.

    The kernel kills the engine when the thread that started it ends (lifeline.py), so no other will do.
    fd: becomes readable when the process ends: no timeout, on any Unix.
    """

    def __init__(self, command: list[str]) -> None:
        """Raises EngineStartError if there can be no process."""
        self.fd, self._end = os.pipe()
        self._begun = threading.Event()
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._refusal: OSError | None = None
        threading.Thread(target=self._live, args=(command,), name="engine-exit", daemon=True).start()
        self._begun.wait()
        if self._refusal is not None:
            self.release()
            raise EngineStartError(f"no process can be started: {self._refusal}") from None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        return self._over.wait(seconds)

    def describe(self) -> str:
        self._over.wait()
        return ending(self._process.returncode if self._process is not None else 0)

    def release(self) -> None:
        os.close(self.fd)

    def _live(self, command: list[str]) -> None:
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        except OSError as error:
            self._refusal = error
        self._begun.set()
        if self._process is not None:
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._over.set()
        os.close(self._end)


# ---------------------------------------------------------------- the engine side


def main(folder: str) -> None:
    """Entry point of the engine process; `folder` holds the sockets."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    exit_at_end_of(sys.stdin.buffer, lambda: shutil.rmtree(folder, ignore_errors=True))
    context = zmq.Context()
    down, up = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    up.set_hwm(0)
    down.connect(f"ipc://{folder}/down")
    up.connect(f"ipc://{folder}/up")

    def send(message: Up) -> None:
        up.send(encoder.encode(message))

    def receive(seconds: float) -> list[Down]:
        messages: list[Down] = []
        if down.poll(int(1000 * seconds)):
            with contextlib.suppress(zmq.Again):
                while True:
                    frame = down.recv(zmq.NOBLOCK)
                    try:
                        messages.append(down_decoder.decode(frame))
                    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                        log.error("a frame of %d bytes is no message: %s", len(frame), type(error).__name__)
        return messages

    launch = msgspec.msgpack.decode(down.recv(), type=Launch)
    logging.basicConfig(level=launch.log_level, format="%(asctime)s %(levelname)s engine: %(message)s")
    startup = Startup(send)
    code = 0
    try:
        with startup.phase("import libraries"):
            _wait_until_gone(folder)
            die_with_parent(launch.parent)
            # Here, not above: the API side imports this module for its client, and needs no torch.
            from .core import EngineCore, run

        core = EngineCore(EngineConfig(**launch.config), startup)  # type: ignore[arg-type]
        send(core.ready)
        run(core, receive, send)
        core.close()
    except (EngineStartError, RankLost) as error:
        code = 1
        send(EngineDead(str(error), "start" if startup.settled else "setting"))
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


def _wait_until_gone(folder: str) -> None:
    """The parent clears the sockets away when it hears that both are connected. Until then the watch of its pipe would
    do it in its place, and nobody else could: what is killed by the kernel clears nothing away.
    """
    while os.path.exists(folder):
        time.sleep(0.001)


if __name__ == "__main__":
    main(sys.argv[1])
