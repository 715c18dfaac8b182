"""`make soak`: all that must hold while a server is leaned on, in one table.

    python -m quire.bench.soak [aborts faults drain cycles memory overload fuzz] [--quick] [--minutes 30] [--json FILE]

Every check starts servers of its own. Exit code 1 if anything failed; what the servers wrote is kept then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from ... import __version__
from . import aborts, cycles, drain, faults, fuzz, memory, overload
from .served import SoakError
from .verdict import Row, table


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything."""

    aborts: int
    fault_rounds: int
    drain_rounds: int
    cycles: int
    cycle_requests: int
    minutes: float
    overload_seconds: float
    overload_rounds: int
    fuzz_scale: float


FULL = Sizes(
    aborts=10_000,
    fault_rounds=5,
    drain_rounds=3,
    cycles=50,
    cycle_requests=100,
    minutes=30,
    overload_seconds=60,
    overload_rounds=5,
    fuzz_scale=1,
)
QUICK = Sizes(
    aborts=500,
    fault_rounds=1,
    drain_rounds=1,
    cycles=3,
    cycle_requests=20,
    minutes=3,
    overload_seconds=20,
    overload_rounds=1,
    fuzz_scale=0.02,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, where, and on which model."""

    folder: Path
    model: str
    seed: int
    sizes: Sizes


CHECKS: dict[str, Callable[[Plan], list[Row]]] = {
    "aborts": lambda p: aborts.check(p.folder, model=p.model, count=p.sizes.aborts, seed=p.seed),
    "faults": lambda p: faults.check(p.folder, model=p.model, rounds=p.sizes.fault_rounds),
    "drain": lambda p: drain.check(p.folder, model=p.model, rounds=p.sizes.drain_rounds),
    "cycles": lambda p: cycles.check(p.folder, model=p.model, cycles=p.sizes.cycles, requests=p.sizes.cycle_requests),
    "memory": lambda p: memory.check(p.folder, model=p.model, minutes=p.sizes.minutes, seed=p.seed),
    "overload": lambda p: overload.check(
        p.folder, model=p.model, seconds=p.sizes.overload_seconds, rounds=p.sizes.overload_rounds
    ),
    "fuzz": lambda p: fuzz.check(p.folder, scale=p.sizes.fuzz_scale),
}


@dataclass(slots=True)
class Report:
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each check

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.ok is False]


def run(names: Sequence[str], plan: Plan, console: Console) -> Report:
    """One check after another. One that cannot be made has failed, and the others go on."""
    report = Report()
    for name in names:
        begin = time.monotonic()
        console.print(f"{name} …", style="dim")
        try:
            report.rows += CHECKS[name](plan)
        except (SoakError, OSError) as error:
            report.rows.append(Row(name, "the check could not be made", str(error), ok=False))
        report.seconds[name] = round(time.monotonic() - begin, 1)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="check", help=f"{', '.join(CHECKS)}; all without any")
    parser.add_argument("--quick", action="store_true", help="a little of everything: minutes, not an hour")
    parser.add_argument("--minutes", type=float, help="of the memory check")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(arguments)

    if unknown := set(options.checks) - set(CHECKS):
        parser.error(f"no such check: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    sizes = QUICK if options.quick else FULL
    if options.minutes is not None:
        sizes = replace(sizes, minutes=options.minutes)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    console = Console()
    console.width = max(console.width, 120)  # in a file too, lines stay lines
    report = run(options.checks or list(CHECKS), Plan(folder, options.model, options.seed, sizes), console)
    console.print(table(report.rows))
    console.print("; ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items()), style="dim")
    if options.json:
        options.json.write_text(json.dumps(_as_json(report, options.quick), indent=1))
    if report.failed:
        console.print(f"{len(report.failed)} of {len(report.rows)} failed; logs: {folder}", style="bold red")
        return 1
    shutil.rmtree(folder)
    return 0


def _as_json(report: Report, quick: bool) -> dict[str, object]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quire_version": __version__,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "quick": quick,
        "seconds": report.seconds,
        "rows": [asdict(row) for row in report.rows],
    }


if __name__ == "__main__":
    sys.exit(main())
