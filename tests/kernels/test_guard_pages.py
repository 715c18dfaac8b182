"""No compiled kernel reads or writes beyond a tensor, by as little as one byte: see guarded.py."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quire.kernels import implementations, ops
from quire.kernels.cpu.native import library

pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))


def run(how: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("guarded.py")
    return subprocess.run([sys.executable, str(script), how], capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("side", ["end", pytest.param("begin", marks=pytest.mark.slow)])
def test_kernels_stay_within_their_tensors(side: str) -> None:
    done = run(side)
    reached = done.stdout.splitlines()
    assert done.returncode == 0, f"died of {done.returncode} in: {reached[-1:]}\n{done.stderr[-3000:]}"
    native = {op for op in ops() if "native" in implementations(op)}
    for level in library.levels():
        seen = {line.split()[1] for line in reached if line.split()[0] == level}
        # Some kernels are for one instruction set alone; what serves a level must have been run there.
        assert seen <= native
        assert {"attention", "rms_norm"} <= seen


@pytest.mark.parametrize("side", ["end", "begin"])
def test_a_trespass_is_fatal(side: str) -> None:
    assert run(f"trespass-{side}").returncode == -signal.SIGSEGV
