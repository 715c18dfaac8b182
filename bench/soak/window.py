"""`quire serve` with a window: on SIGUSR1 it writes what its process holds. And with leaks to plant.

    python -m quire.bench.soak.window FILE serve …

The window counts what cannot be seen from outside: asyncio tasks, and objects of the server's own classes. A request
whose X-Request-Id names one of PLANTS leaks just that for good, so whoever looks for leaks must find it. Nothing of the
server is changed for this: the leaks hang on the library that reads its HTTP.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

LEAKED_BYTES = 1024  # by each request with `plant-memory`

_kept: list[object] = []


def _leak_task() -> None:
    _kept.append(asyncio.get_running_loop().create_task(asyncio.Event().wait()))


def _leak_fd() -> None:
    _kept.append(os.open(os.devnull, os.O_RDONLY))


def _leak_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def _leak_child() -> None:
    _kept.append(subprocess.Popen(["sleep", "1000"]))


def _leak_object() -> None:
    """The state of a request that nobody lets go of."""
    kind = sys.modules["quire.server.generate"].Generation
    _kept.append(kind.__new__(kind))


def _leak_memory() -> None:
    _kept.append(bytearray(LEAKED_BYTES))


PLANTS = {
    "plant-task": _leak_task,
    "plant-fd": _leak_fd,
    "plant-thread": _leak_thread,
    "plant-child": _leak_child,
    "plant-object": _leak_object,
    "plant-memory": _leak_memory,
}


def _let_requests_plant() -> None:
    begin = RequestResponseCycle.__init__

    def leaking(self: RequestResponseCycle, scope: Any, *rest: Any, **options: Any) -> None:
        begin(self, scope, *rest, **options)
        for name, value in scope["headers"]:
            if name == b"x-request-id" and (leak := PLANTS.get(value.decode("latin-1"))):
                leak()

    RequestResponseCycle.__init__ = leaking  # type: ignore[method-assign]


def _is_ours(thing: object) -> bool:
    module = type(thing).__module__
    return isinstance(module, str) and module.startswith("quire.")  # some libraries have odd ones


def _show(path: Path) -> None:
    """Runs on the event loop's thread, between two callbacks, as handlers of signals do."""
    gc.collect()
    held = Counter(f"object {type(thing).__name__}" for thing in gc.get_objects() if _is_ours(thing))
    held["tasks"] = len(asyncio.all_tasks())
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(held))
    draft.rename(path)


if __name__ == "__main__":
    window = Path(sys.argv.pop(1))
    _let_requests_plant()
    signal.signal(signal.SIGUSR1, lambda number, frame: _show(window))
    runpy.run_module("quire.server.cli", run_name="__main__", alter_sys=True)
