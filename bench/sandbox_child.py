"""Runs a module that a model wrote a part of, and checks examples against it. Started by `sandbox.py`, never imported.

    python -I -S sandbox_child.py MODULE_FILE MODULE_NAME        examples and password: two JSON strings on stdin

The last line of the output is the password if every example gave what it should. The candidate cannot have known it,
so ending the process early, or printing, does not pass.
"""

import doctest
import json
import os
import resource
import runpy
import sys

CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20
OPEN_FILES = 32

# What raises an audit event of these kinds is refused: processes, signals, the network, foreign code, other limits.
REFUSED = ("os.", "subprocess.", "socket.", "ctypes.", "resource.", "signal.", "fcntl.", "pty.", "urllib.", "shutil.")
ALLOWED = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}  # the import system looks into folders
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit() -> None:
    """By the kernel; what is lowered here cannot be raised again."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def refuse(event: str, args: tuple[object, ...]) -> None:
    """An audit hook: it cannot be taken off again."""
    if event.startswith(REFUSED) and event not in ALLOWED:
        raise PermissionError(f"{event} is not for model-written code")
    if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
        raise PermissionError("files are only for reading")


def main() -> None:
    file, name = sys.argv[1:]
    examples, password = json.load(sys.stdin)
    sys.argv = [file]
    limit()
    sys.addaudithook(refuse)
    namespace = runpy.run_path(file, run_name=name)
    test = doctest.DocTestParser().get_doctest(examples, namespace, name, None, 0)
    results = doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None)
    if results.attempted and not results.failed:
        print("\n" + password)


if __name__ == "__main__":
    main()
