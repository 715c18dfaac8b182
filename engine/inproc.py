"""The engine on a thread of this process: for tests and offline use, where a crash may take everything along."""

from __future__ import annotations

import math
import queue
import threading

from .client import Heartbeat, OnMessage
from .config import EngineConfig
from .core import EngineCore, run
from .errors import EngineDeadError, EngineStartError, RankLost
from .messages import Abort, AddRequest, Busy, Down, EngineDead, EngineReady, Shutdown, StepOutputs, Up, Watch
from .startup import Startup


class InprocClient:
    """An engine on a thread; see `client.EngineClient`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._inbox: queue.SimpleQueue[Down] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._dead: str | None = None
        self._heartbeat = Heartbeat()

    def start(self, on_message: OnMessage) -> EngineReady:
        self._on_message = on_message
        started: queue.SimpleQueue[EngineReady | BaseException] = queue.SimpleQueue()
        # The model is built on the engine's own thread: torch keeps inference mode and thread counts per thread.
        self._thread = threading.Thread(target=self._main, args=(started,), name="engine", daemon=True)
        self._thread.start()
        ready = started.get()
        if isinstance(ready, BaseException):
            self._dead = str(ready)
            raise ready
        return ready

    def send(self, message: AddRequest | Abort | Watch) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        self._inbox.put(message)

    def heartbeat_age(self) -> float:
        return math.inf if self._dead is not None else self._heartbeat.age()

    def kill(self) -> None:
        self._inbox.put(Shutdown())

    def close(self) -> None:
        self._inbox.put(Shutdown())
        if self._thread is not None:
            self._thread.join()
        self._dead = self._dead or "the engine was closed"

    def _main(self, started: queue.SimpleQueue[EngineReady | BaseException]) -> None:
        try:
            core = EngineCore(self._config, Startup(self._on_message))
        except EngineStartError as error:
            started.put(error)
            return
        except BaseException as error:
            started.put(EngineStartError(f"{type(error).__name__}: {error}"))
            raise
        self._heartbeat.beat()
        started.put(core.ready)
        try:
            run(core, self._receive, self._send)
            core.close()
        except RankLost as error:
            self._dead = str(error)
            self._on_message(EngineDead(self._dead))
            core.close()
        except BaseException as error:
            self._dead = f"{type(error).__name__}; the engine's log has the details"
            self._on_message(EngineDead(self._dead))
            raise

    def _receive(self, seconds: float) -> list[Down]:
        messages: list[Down] = []
        try:
            messages.append(self._inbox.get(timeout=seconds) if seconds else self._inbox.get_nowait())
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return messages

    def _send(self, message: Up) -> None:
        self._heartbeat.beat(message.seconds if isinstance(message, Busy) else 0.0)
        if isinstance(message, StepOutputs):
            self._on_message(message)
