"""The C++ kernels under a sanitizer: builds them with it into a folder, then runs the tests of the compiled kernels.

    python tests/sanitizers/sanitize.py address|thread [--folder DIR] [--only-pool] [PYTEST ARGUMENTS]

address is AddressSanitizer and UndefinedBehaviorSanitizer; thread is ThreadSanitizer, which cannot be in one process
with them. First comes pool_driver.cpp, a program of its own that does nothing but use the pool; --only-pool ends there.
Sources and flags are those of pyproject.toml. Exit status: 0, or that of the first command that failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "cpu" / "native" / "src"
COMPILER = os.environ.get("CXX", "g++")

FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
# Python and torch keep memory until they end, and were not compiled with the sanitizers: what they do is not judged.
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:die_after_fork=0"},
}


def flags(sanitizer: str) -> list[str]:
    """Those of the install, with the sanitizer's and names for its reports; without what hides where things are."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    usual = settings["tool"]["setuptools"]["ext-modules"][0]["extra-compile-args"]
    kept = [flag for flag in usual if flag not in ("-O3", "-g0")]
    return [*kept, "-O1", "-g1", "-fno-omit-frame-pointer", *FLAGS[sanitizer]]


def run(command: list[str], **settings: object) -> None:
    """SystemExit with the command's status where that is not 0."""
    done = subprocess.run(command, **settings)  # type: ignore[call-overload]
    if done.returncode:
        print("failed:", *command, file=sys.stderr)
        raise SystemExit(done.returncode if done.returncode > 0 else 1)


def drive_pool(sanitizer: str, folder: Path) -> None:
    """Build and run the program that exercises the threads."""
    program = folder / f"pool-{sanitizer}"
    sources = [Path(__file__).with_name("pool_driver.cpp"), SOURCES / "pool.cpp"]
    run([COMPILER, *flags(sanitizer), f"-I{SOURCES}", *map(str, sources), "-o", str(program)])
    run([*unmoved(sanitizer), str(program)], env=os.environ | OPTIONS[sanitizer], timeout=300)


def build(sanitizer: str, folder: Path) -> Path:
    """The library, compiled with the sanitizer by as many compilers as there are cores."""
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [folder / f"{source.stem}-{sanitizer}.o" for source in sources]
    library = folder / f"kernels-{sanitizer}.so"

    def compile_one(source: Path, target: Path) -> None:
        run([COMPILER, *flags(sanitizer), "-fPIC", "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        list(compilers.map(compile_one, sources, objects))
    run([COMPILER, *FLAGS[sanitizer], "-shared", "-pthread", *map(str, objects), "-o", str(library)])
    return library


def unmoved(sanitizer: str) -> list[str]:
    """ThreadSanitizer wants an address space less widely shuffled than new kernels do; containers may forbid to ask."""
    ask = ["setarch", "-R"]
    allowed = shutil.which(ask[0]) and subprocess.run([*ask, "true"], capture_output=True).returncode == 0
    return ask if sanitizer == "thread" and allowed else []


def runtime(name: str) -> str:
    return subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()


def run_tests(sanitizer: str, library: Path, arguments: list[str]) -> None:
    """The tests of the compiled kernels, with the library that was built."""
    # The C++ library before all: whoever throws first must be known to the sanitizer.
    loaded = ":".join(runtime(name) for name in (*RUNTIMES[sanitizer], "libstdc++.so.6"))
    environment = os.environ | OPTIONS[sanitizer] | {"LD_PRELOAD": loaded, "QUIRE_NATIVE_LIBRARY": str(library)}
    tests = arguments or [str(ROOT / "tests" / "kernels"), "-k", "native"]  # in the file's name or as a parameter
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-q", *tests]
    run([*unmoved(sanitizer), *command], env=environment, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", choices=FLAGS)
    parser.add_argument("--folder", type=Path, help="for what is built; nothing = a temporary one")
    parser.add_argument("--only-pool", action="store_true")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        drive_pool(options.sanitizer, folder)
        if not options.only_pool:
            run_tests(options.sanitizer, build(options.sanitizer, folder), arguments)


if __name__ == "__main__":
    main()
