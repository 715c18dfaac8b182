"""Chat templates in processes of their own, which end when a template does not.

    text thread ── Ask ──▶ worker: Template(source).render(variables) ── Answer ──▶ text thread

The sandbox (`template.py`) counts what a template does; here the kernel does. A worker whose render takes more than
CPU_SECONDS of processor time is killed by its own timer, memory beyond MEMORY_BYTES is not given to it, it can write no
file, start no process, and has none of the server's environment. One that has died is replaced by the next render.
Workers keep nothing between two renders but compiled templates, so any of them serves any request.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from jinja2.exceptions import TemplateError

from .framing import frame, receive
from .template import Complaint, Template

CPU_SECONDS = 1.0  # the sandbox's own count ends sooner, with a better message: this is for what it cannot interrupt
WALL_SECONDS = 30.0  # a worker that does not run at all: stopped, or on a machine that is frozen
MEMORY_BYTES = 1 << 30  # address space: the interpreter takes 60 MB, the sandbox's MAX_WORK_CHARS four bytes each
MAX_FRAME_BYTES = 64 << 20  # a full output is 16 MiB at most; a request's body is bounded long before
KEPT_TEMPLATES = 16  # compiled, per worker: a folder has one or two, requests bring others only where they are trusted
# -P: the working directory is not searched for modules, whatever lies there.
COMMAND = (sys.executable, "-P", "-m", "quire.engine.rendering")
# What a worker needs of the environment to find its modules and the local time: no keys, no tokens, no proxies.
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")


class Ask(msgspec.Struct):
    """What a worker is to do. `variables`: JSON text, whose numbers have any size; None = only compile."""

    source: str
    variables: str | None = None


class Answer(msgspec.Struct):
    """What came of it. `names`: the variables that the template reads from its caller."""

    text: str = ""
    names: list[str] = []
    error: str | None = None
    kind: Literal["fault", "complaint"] = "fault"  # of the error: the template's own words are a complaint


_encoder = msgspec.msgpack.Encoder()
_asks = msgspec.msgpack.Decoder(Ask)
_answers = msgspec.msgpack.Decoder(Answer)


# ---------------------------------------------------------------- the side that asks


class RemoteTemplate:
    """A template that is compiled and rendered in a worker; as `template.Template`."""

    def __init__(self, source: str, workers: Workers) -> None:
        """Raises TemplateError."""
        self.source = source
        self._workers = workers
        self.variables = frozenset(workers.ask(Ask(source)).names)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises TemplateError for whatever goes wrong inside, the worker's death included."""
        return self._workers.ask(Ask(self.source, json.dumps(variables, ensure_ascii=False))).text


class Workers:
    """As many workers as threads ask at once: an idle one is used, and started where there is none."""

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()

    def warm(self, count: int) -> None:
        """Start workers until `count` are idle, so that no request waits for a start."""
        for _ in range(count - self._idle.qsize()):
            self._idle.put(_Worker())

    def compile(self, source: str) -> RemoteTemplate:
        """Raises TemplateError."""
        return RemoteTemplate(source, self)

    def ask(self, ask: Ask) -> Answer:
        """Raises TemplateError with what went wrong."""
        answer = self._ask(ask) or self._ask(ask)  # a worker may have died of something else since it was last used
        if answer is None:
            raise TemplateError("the process that renders the template ended twice")
        if answer.error is not None:
            raise (Complaint if answer.kind == "complaint" else TemplateError)(answer.error)
        return answer

    def _ask(self, ask: Ask) -> Answer | None:
        """None if the worker ended, and the template was not the cause for sure."""
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker()
        try:
            answer = worker.ask(_encoder.encode(ask))
        except (OSError, EOFError, msgspec.DecodeError) as error:
            code = worker.how_it_ended()
            self._idle.put(_Worker())
            if code == -signal.SIGPROF:
                return Answer(error=f"the template runs for more than {CPU_SECONDS:g} s")
            return Answer(error="the template gives no answer") if isinstance(error, TimeoutError) else None
        self._idle.put(worker)
        return answer

    def close(self) -> None:
        """End the idle workers. Those of a process that ends need no call: their sockets close."""
        while not self._idle.empty():
            self._idle.get_nowait().end()


@functools.cache
def shared_workers() -> Workers:
    """The workers of this process."""
    return Workers()


class _Worker:
    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            )

    def ask(self, message: bytes) -> Answer:
        """Raises OSError or EOFError when the worker ends, TimeoutError when it does nothing."""
        deadline = time.monotonic() + WALL_SECONDS
        self._socket.settimeout(WALL_SECONDS)
        self._socket.sendall(frame(message))
        return _answers.decode(receive(self._socket, MAX_FRAME_BYTES, deadline))

    def how_it_ended(self) -> int:
        """The exit code of a worker that is of no use any more; its socket may close a moment before it has one."""
        try:
            return self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            return self.end()
        finally:
            self._socket.close()

    def end(self) -> int:
        self._socket.close()
        self._process.kill()
        return self._process.wait()


# ---------------------------------------------------------------- the worker


def main() -> None:
    """Entry point of a worker: answer until the other side closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which ends this process by closing
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=0)
    _confine()
    while True:
        try:
            message = receive(connection, MAX_FRAME_BYTES)
        except (EOFError, OSError):
            return
        # Its default action ends the process: no code of the template runs any more, not even a finally.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _encoder.encode(_answer(message))
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            connection.sendall(frame(answer))
        except OSError:
            return


def _answer(message: bytes) -> Answer:
    try:
        ask = _asks.decode(message)
        template = _compiled(ask.source)
        names = sorted(template.variables)
        return Answer(names=names) if ask.variables is None else Answer(template.render(json.loads(ask.variables)))
    except TemplateError as error:
        kind: Literal["fault", "complaint"] = "complaint" if isinstance(error, Complaint) else "fault"
        return Answer(error=error.message or type(error).__name__, kind=kind)
    except Exception as error:
        return Answer(error=f"{type(error).__name__} beside the chat template")


@functools.lru_cache(maxsize=KEPT_TEMPLATES)
def _compiled(source: str) -> Template:
    return Template(source)


def _confine() -> None:
    """Take away what a renderer never needs, should a template get out of its sandbox."""
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    main()
