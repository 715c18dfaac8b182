"""An engine that is watched, killed when it hangs, and started again when it has ended.

    serving ──ends, or is killed for its silence──▶ EngineDead ──back-off──▶ start ──▶ EngineReady ──▶ serving
                                                                              └─fails─▶ EngineDead ─ … ─▶ the last one

To its user it is an `EngineClient` like any other, which comes back from the dead. What the dead one was working on is
lost; whoever asks in between gets EngineDeadError. The second engine is the first one's double: it is given the sizes
that the first one found, so that every limit that was promised still holds.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .client import EngineClient, News, OnMessage
from .config import EngineConfig
from .errors import EngineDeadError, EngineError, EngineStartError
from .messages import Abort, AddRequest, EngineDead, EngineHung, EngineReady, Progress, Watch

log = logging.getLogger(__name__)

TICK = 0.25  # seconds between two looks at the engine
KILL_AFTER = 2.0  # times the hang timeout: before, an engine that only stood still may go on

BACKOFF_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # before each new start in a row; the last one from then on
STEADY_SECONDS = 60.0  # an engine that has served so long ended for another reason than the one before it

# A start that takes so much longer than the first one did hangs. The first one is watched by whoever waits for it.
START_FACTOR, START_SECONDS = 5.0, 60.0


class Supervisor:
    """See `client.EngineClient`.

    make          an engine of a configuration, not started
    hang_timeout  seconds of silence after which the engine is reported to hang; it is killed after twice as many
    max_restarts  engines in a row that may end, or fail to start, before it is given up: the last EngineDead is final
    """

    def __init__(
        self,
        make: Callable[[EngineConfig], EngineClient],
        config: EngineConfig,
        *,
        hang_timeout: float,
        max_restarts: int,
    ) -> None:
        self._make = make
        self._config = config
        self._hang_timeout = hang_timeout
        self._max_restarts = max_restarts
        self._client: EngineClient | None = None
        self._ready: EngineReady | None = None
        self._start_seconds = 0.0
        self._ends = 0  # in a row
        self._serving_since: float | None = None  # None = no engine serves
        self._end: EngineDead | None = None  # the last word of one that ended while nobody listened
        self._silence = _Silence()
        self._hung = False  # it has been reported
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._telling = threading.RLock()  # news go out one by one, in the order in which they are true
        self._thread = threading.Thread(target=self._watch, name="engine-supervisor", daemon=True)

    def start(self, on_message: OnMessage) -> EngineReady:
        self._tell = on_message
        began = time.monotonic()
        client = self._client = self._make(self._config)
        if self._closing.is_set():
            raise EngineStartError("the engine was closed before it started")
        self._ready = client.start(partial(self._hear, client))
        self._start_seconds = time.monotonic() - began
        self._config = _double(self._config, self._ready)
        self._serve()
        self._thread.start()
        return self._ready

    def send(self, message: AddRequest | Abort | Watch) -> None:
        client = self._client
        if self._serving_since is None or client is None:
            raise EngineDeadError("the engine is being started again")
        client.send(message)

    def heartbeat_age(self) -> float:
        client = self._client
        if self._serving_since is None or client is None:
            return math.inf
        return min(client.heartbeat_age(), self._silence.bound())

    def kill(self) -> None:
        if self._client is not None:
            self._client.kill()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        if self._serving_since is None:
            self.kill()  # ends a start that is under way
        if self._thread.is_alive():
            self._thread.join()
        if self._client is not None:
            self._client.close()

    # ---------------------------------------------------------------- on the engine's threads

    def _hear(self, client: EngineClient, message: News) -> None:
        with self._telling:
            if client is not self._client:  # it was killed, and is slow to end
                return
            if isinstance(message, EngineDead):
                if self._serving_since is None:
                    self._end = message
                else:
                    self._mourn(message)
            elif self._serving_since is not None or isinstance(message, Progress):
                self._tell(message)

    def _mourn(self, message: EngineDead) -> None:
        """Nobody serves any more; say so, and whether that is the end."""
        since, self._serving_since = self._serving_since, None
        if since is not None and time.monotonic() - since > STEADY_SECONDS:
            self._ends = 0
        self._ends += 1
        final = self._ends > self._max_restarts
        if final:
            log.error("the engine is given up: it has ended %d times in a row", self._ends)
            self._closing.set()
        self._tell(EngineDead(message.reason, message.kind, final))
        self._wake.set()

    def _serve(self) -> None:
        """An engine has started: from here on it is heard. It may have ended before that."""
        with self._telling:
            self._silence = _Silence()
            self._hung = False
            self._serving_since = time.monotonic()
            if self._end is not None:
                self._mourn(self._end)
                self._end = None

    # ---------------------------------------------------------------- on the supervisor's thread

    def _watch(self) -> None:
        try:
            while not self._closing.is_set():
                if self._serving_since is None:
                    self._start_again()
                else:
                    self._look()
                self._wake.wait(TICK)
                self._wake.clear()
        except Exception as error:  # without a watch nothing of this holds
            log.exception("the supervisor cannot go on")
            with self._telling:
                self._serving_since = None
                self._tell(EngineDead(f"its supervisor failed: {type(error).__name__}", "crash"))

    def _look(self) -> None:
        """Report an engine that is silent, and kill one that stays so."""
        client = self._client
        if client is None:
            return
        silence = self._silence.after(client.heartbeat_age())
        if silence <= self._hang_timeout:
            self._hung = False
        elif not self._hung:
            self._hung = True
            log.error("the engine has given no sign of life for %.1f s", silence)
            with self._telling:
                self._tell(EngineHung(silence))
        if silence > KILL_AFTER * self._hang_timeout:
            with self._telling:
                if self._serving_since is not None:
                    self._mourn(EngineDead(f"it was silent for {silence:.1f} s, and is killed", "hang"))
            client.kill()

    def _start_again(self) -> None:
        if self._client is not None:
            self._client.close()
        self._end = None  # what the one that was killed had to say
        if self._closing.wait(BACKOFF_SECONDS[min(self._ends, len(BACKOFF_SECONDS)) - 1]):
            return
        log.warning("starting the engine again, %d of at most %d times in a row", self._ends, self._max_restarts)
        client = self._client = self._make(self._config)
        if self._closing.is_set():
            return
        limit = threading.Timer(START_SECONDS + START_FACTOR * self._start_seconds, client.kill)
        limit.start()
        try:
            ready = client.start(partial(self._hear, client))
            self._compare(ready)
        except Exception as error:  # what the system refuses just now, a descriptor or a file, it may give the next one
            client.kill()
            reason = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            if not self._closing.is_set():
                with self._telling:
                    self._mourn(EngineDead(f"it cannot be started again: {reason}", "start"))
            return
        finally:
            limit.cancel()
        with self._telling:
            self._tell(ready)
            self._serve()

    def _compare(self, ready: EngineReady) -> None:
        """Raises EngineStartError for an engine that is not the first one's double: somebody changed its folder."""
        assert self._ready is not None
        for name in ("model_type", "num_parameters", "vocab_size", "max_model_len", "max_num_seqs", "eos_token_ids"):
            was, now = getattr(self._ready, name), getattr(ready, name)
            if was != now:
                raise EngineStartError(f"{name} is {now} and was {was}: the model has changed; start the server anew")


class _Silence:
    """How long the engine has been silent while somebody listened.

    Counted in looks, none of which counts for more than two: of a machine that stood still for a minute nobody can say
    that its engine hangs.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._looked = time.monotonic()

    def after(self, age: float) -> float:
        """Look: the last sign of life is `age` seconds old."""
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        before = self._seconds if age >= passed else 0.0  # or it has spoken since
        self._seconds = before + min(passed, age, 2 * TICK)
        return self._seconds

    def bound(self) -> float:
        """It has not been silent for longer than this."""
        return self._seconds + 2 * TICK


def _double(config: EngineConfig, ready: EngineReady) -> EngineConfig:
    """The configuration of an engine that is like the one that is ready, whatever memory is free by then."""
    return replace(
        config,
        model=ready.model_path,
        revision=None,
        max_model_len=ready.max_model_len,
        num_blocks=ready.num_blocks,
        kv_cache_bytes=None,
        gpu_memory_utilization=None,
    )
