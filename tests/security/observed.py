"""`quire serve` with a window: SIGUSR1 writes what the server's process holds, and planted requests leak on purpose.

The window counts what cannot be seen from outside: asyncio tasks, and objects that live as long as a request does.
A request whose X-Request-Id is `plant-task`, `plant-fd`, … leaks one of these for good: whoever looks for leaks must
find it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire.server import middleware
from quire.server.admission import Slot
from quire.server.cli import main
from quire.server.dispatcher import Mailbox
from quire.server.generate import Generation

OF_REQUESTS = (Generation, Mailbox, Slot)

kept: list[Any] = []


def leak_task() -> None:
    kept.append(asyncio.get_running_loop().create_task(asyncio.Event().wait()))


def leak_fd() -> None:
    kept.append(os.open("/dev/null", os.O_RDONLY))


def leak_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def leak_child() -> None:
    kept.append(subprocess.Popen(["sleep", "1000"]))


def leak_object() -> None:
    kept.append(Mailbox.__new__(Mailbox))


PLANTS: dict[str, Callable[[], None]] = {
    f"plant-{name.removeprefix('leak_')}": function for name, function in globals().items() if name.startswith("leak_")
}


def plant() -> None:
    """Let the outermost layer leak what the request's id names."""
    serve = middleware.Outermost.__call__

    async def leaking(self: Any, scope: Any, receive: Any, send: Any) -> None:
        for name, value in scope.get("headers", ()):
            if name == b"x-request-id" and value.decode("latin-1") in PLANTS:
                PLANTS[value.decode()]()
        await serve(self, scope, receive, send)

    middleware.Outermost.__call__ = leaking  # type: ignore[method-assign]


def show(path: Path) -> None:
    """On the event loop's thread: a signal handler runs there, between two callbacks."""
    gc.collect()
    counts = {kind.__name__: 0 for kind in OF_REQUESTS}
    for thing in gc.get_objects():
        if type(thing) in OF_REQUESTS:
            counts[type(thing).__name__] += 1
    seen = {"tasks": len(asyncio.all_tasks()), **counts}
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(seen))
    draft.rename(path)


if __name__ == "__main__":
    window = Path(sys.argv.pop(1))
    plant()
    signal.signal(signal.SIGUSR1, lambda number, frame: show(window))
    main()
