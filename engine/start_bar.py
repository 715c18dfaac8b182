"""How far a start is, drawn on a terminal; where there is none, nothing moves."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .messages import Progress as Starting

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class StartBar:
    """`tell` it of every look at the start; it draws when something is to be seen, and goes when the start is over."""

    def __init__(self) -> None:
        self._drawn: tuple[Progress, TaskID] | None = None

    def tell(self, starting: Starting | None) -> None:
        if starting is None:
            self.close()
        elif sys.stderr.isatty() or self._drawn is not None:
            self._draw(starting)

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn[0].stop()
            self._drawn = None

    def _draw(self, starting: Starting) -> None:
        if self._drawn is None:
            self._drawn = _open()
        progress, task = self._drawn
        progress.update(task, description=starting.phase, completed=starting.done or 0.0, total=_total(starting))
        progress.refresh()


def _total(starting: Starting) -> float | None:
    return None if starting.done is None else 1.0


def _open() -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # Drawn by whoever tells it, ten times a second: a thread of its own would draw while the event loop logs.
    progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
    progress.start()
    return progress, progress.add_task("starting", total=None)
