"""One line of the table: what was asked, what was measured, and whether that is enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Row:
    """`ok` None: a figure to know beside the others, which nothing is judged by."""

    check: str
    what: str
    measured: str
    bound: str = ""
    ok: bool | None = None


def at_most(check: str, what: str, seconds: float, bound: float) -> Row:
    return Row(check, what, f"{seconds:.2f} s", f"≤ {bound:g} s", seconds <= bound)


def none(check: str, what: str, count: float) -> Row:
    return Row(check, what, f"{count:g}", "0", count == 0)


def all_of(check: str, what: str, count: int, total: int) -> Row:
    return Row(check, what, f"{count} of {total}", "all", count == total > 0)


def table(rows: Iterable[Row]) -> Table:
    lines = Table("check", "what", "measured", "bound", "")
    for row in rows:
        verdict = {None: Text(""), True: Text("ok", style="green"), False: Text("FAILED", style="bold red")}[row.ok]
        lines.add_row(row.check, Text(row.what), Text(row.measured), Text(row.bound), verdict)
    return lines
