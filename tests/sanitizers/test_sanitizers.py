"""The C++ under sanitizers: the threads always, all kernels where the heavy suites run. See sanitize.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX", "g++")
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}


def missing(sanitizer: str) -> bool:
    if shutil.which(COMPILER) is None or sys.platform != "linux":
        return True
    found = subprocess.check_output([COMPILER, f"-print-file-name={LIBRARIES[sanitizer]}"], text=True).strip()
    return not Path(found).is_absolute()


def sanitize(sanitizer: str, *arguments: str) -> None:
    if missing(sanitizer):
        pytest.skip(f"no compiler with {LIBRARIES[sanitizer]}")
    script = Path(__file__).with_name("sanitize.py")
    done = subprocess.run([sys.executable, str(script), sanitizer, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.mark.parametrize("sanitizer", LIBRARIES)
def test_the_threads(sanitizer: str, tmp_path: Path) -> None:
    sanitize(sanitizer, "--only-pool", "--folder", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", LIBRARIES)
def test_the_kernels(sanitizer: str, tmp_path: Path) -> None:
    sanitize(sanitizer, "--folder", str(tmp_path))
