"""A child process that does not outlive its parent, however the parent ends: two cords, since either may be slow.

    the kernel     kills the child when the thread that started it ends (Linux); it needs nothing of the child
    a pipe's end   comes when the parent is gone; the child's watch then clears away what lies around, and exits

The first is the surer one: the watch is a Python thread, and must wait while a native library holds the interpreter.
The second works on any Unix, and before the first is tied.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends. `parent`: that thread's process.

    Ends the process at once if the parent has gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def ending(code: int) -> str:
    """How a process ended, of its return code as `subprocess` gives it."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def exit_at_end_of(pipe: BinaryIO, clear_away: Callable[[], None]) -> None:
    """Exit when `pipe` closes; nobody writes to it, and the parent alone holds its other end."""

    def watch() -> None:
        pipe.read()
        clear_away()
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
