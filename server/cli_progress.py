"""Bars on stderr for what takes long; nothing at all where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .cli_options import err


class Bar:
    """`show(done, total, text)` moves it; total None = nobody knows how much there is. This one shows nothing."""

    def show(self, done: float, total: float | None, text: str = "") -> None:
        pass


@contextmanager
def bar(what: str) -> Iterator[Bar]:
    """A bar that goes away at the end: what stays on the screen is the result."""
    if not sys.stderr.isatty():
        yield Bar()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Drawn(Bar):
        def __init__(self, progress: Progress) -> None:
            self._progress = progress
            self._task = progress.add_task(what, total=None, text="")

        def show(self, done: float, total: float | None, text: str = "") -> None:
            self._progress.update(self._task, completed=done, total=total, text=text)

    class Count(MofNCompleteColumn):
        def render(self, task: object) -> Text:
            return Text("") if getattr(task, "total", None) is None else super().render(task)  # type: ignore[arg-type]

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        Count(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield Drawn(progress)
