"""What the GPU check reports: one row per thing looked at, a table for eyes, JSON for comparing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

ERROR = "rel. error"  # the unit of comparisons
STATUSES = ("ok", "wrong", "below", "failed", "skipped")


@dataclass(slots=True)
class Row:
    """One line of the report.

    status   "ok"; "wrong" = differs from the reference; "below" = misses its target; "failed" = raised, crashed or
             hung; "skipped" = not run, `note` says why
    figure   what was achieved, in `unit`; share: of the card's measured limit for it
    peer     how many times as fast as the `note`d or obvious other implementation
    target   what was aimed at, in words
    """

    section: str
    name: str
    status: str = "ok"
    seconds: float | None = None
    figure: float | None = None
    unit: str = ""
    share: float | None = None
    peer: float | None = None
    target: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to look at; building it does no work on the device."""

    key: str
    run: Callable[[], list[Row]] = field(compare=False)


def condensed(rows: Sequence[Row]) -> list[Row]:
    """Comparisons that are ok, as one row per op; everything else as it is."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        fine = row.status == "ok" and row.unit == ERROR
        groups.setdefault(row.name.split(" ")[0] if fine else row.name, []).append(row)
    short: list[Row] = []
    for name, group in groups.items():
        if len(group) == 1:
            short += group
        else:
            largest = max(row.figure or 0.0 for row in group)
            short.append(Row(group[0].section, f"{name}: {len(group)} cases", figure=largest, unit=ERROR))
    return short


def table(rows: Sequence[Row]) -> str:
    """The report as fixed columns, a heading per section."""
    lines: list[str] = []
    section = None
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", f"{section}", "-" * len(section)]
        lines.append(line(row))
    return "\n".join(lines)


def line(row: Row) -> str:
    """One row as text."""
    took = "" if row.seconds is None else _duration(row.seconds)
    figure = "" if row.figure is None else f"{row.figure:,.4g} {row.unit}"
    share = "" if row.share is None else f"{100 * row.share:.0f} %"
    peer = "" if row.peer is None else f"{row.peer:.2f} x"
    note = "; ".join(part for part in (row.target and f"target {row.target}", row.note) if part)
    return f"{row.status:<8}{row.name:<58}{took:>10}{figure:>18}{share:>7}{peer:>9}  {note}".rstrip()


def _duration(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f} µs" if seconds < 1e-2 else f"{1e3 * seconds:,.1f} ms"


def summary(rows: Sequence[Row]) -> str:
    """ "312 rows: 300 ok, 2 wrong, ..." """
    counts = {status: sum(row.status == status for row in rows) for status in STATUSES}
    return f"{len(rows)} rows: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n)


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]
