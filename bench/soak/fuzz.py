"""Bad inputs by the ten thousand: a program of the tests makes and judges them, and has the last word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .verdict import Row

CHECK = "fuzz"
PROGRAM = Path(__file__).resolve().parents[2] / "tests" / "security" / "fuzz.py"


def check(folder: Path, *, scale: float) -> list[Row]:
    """`scale` of the number of inputs; 1 = all."""
    if not PROGRAM.exists():
        return [Row(CHECK, "generated bad inputs", "an installed package has no tests: run it in a checkout", ok=False)]
    return [judge(folder, (sys.executable, str(PROGRAM), "--scale", f"{scale:g}"))]


def judge(folder: Path, command: tuple[str, ...]) -> Row:
    log = folder / f"{CHECK}.log"
    with log.open("wb") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Row(CHECK, "generated bad inputs", lines[-1] if lines else "it said nothing", "0 wrong", code == 0)
