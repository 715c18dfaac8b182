"""Checks that have a program of their own, which judges itself: run it, and take its word and its last line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .verdict import Row

ROOT = Path(__file__).resolve().parents[2]


def overload(folder: Path, *, options: tuple[str, ...]) -> list[Row]:
    """Goodput with ten times the load that can be served."""
    return [
        _run(folder, "overload", "goodput at 10x overload", (sys.executable, "-m", "quire.bench.overload", *options))
    ]


def fuzz(folder: Path, *, scale: float) -> list[Row]:
    """Bad inputs by the ten thousand. The program is one of the tests, which an installed package does not have."""
    program = ROOT / "tests" / "security" / "fuzz.py"
    if not program.exists():
        return [Row("fuzz", "generated bad inputs", "not here: an installed package has no tests")]
    return [_run(folder, "fuzz", "generated bad inputs", (sys.executable, str(program), "--scale", f"{scale:g}"))]


def _run(folder: Path, check: str, what: str, command: tuple[str, ...]) -> Row:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{check}.log"
    with log.open("wb") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Row(check, what, lines[-1] if lines else "it said nothing", "exit code 0", code == 0)
