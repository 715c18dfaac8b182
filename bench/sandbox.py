"""Model-written code is run only here: another process, without site packages or environment, under limits.

What holds it is the kernel's limits on CPU time, memory, file size and processes, an audit hook that refuses the
network, processes and writing (`sandbox_child.py`), and the time this side waits. It is a fence against accidents of a
small model, not a prison for an adversary: that would take a virtual machine.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
WALL_SECONDS = 5.0  # beyond the child's own CPU limit, for what sleeps


def passes(source: str, module_name: str, examples: str) -> bool:
    """Whether the module `source` loads and every doctest example gives what it should, in time and within the limits.

    examples: text as in a docstring, `>>> expression` and its expected output.
    """
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="quire-sandbox-") as folder:
        file = Path(folder, "candidate.py")
        file.write_text(source, encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-W", "ignore", str(CHILD), str(file), module_name],
                input=json.dumps([examples, password]).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=WALL_SECONDS,
                cwd=folder,
                env={},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.rstrip().endswith(b"\n" + password.encode())
