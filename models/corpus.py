"""The text: every module of the running interpreter's standard library, split into training and held-out files."""

import lzma
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HELD_OUT_EVERY = 20
# Two modules are near duplicates when they share this many distinct long lines, and this share of the smaller one's:
# the code-page tables in `encodings`, copied helpers, the twin tests of the C and the Python implementation.
DUPLICATE_LINES, DUPLICATE_SHARE = 10, 0.3
LONG_LINE = 20
TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Module:
    path: str  # relative to the library's folder, with forward slashes
    text: str

    @property
    def is_test(self) -> bool:
        return not TEST_FOLDERS.isdisjoint(self.path.split("/"))


@dataclass(frozen=True)
class Split:
    library: list[Module]  # training: everything outside test folders
    tests: list[Module]  # training: the library's own tests
    held_out: list[Module]  # validation: every 20th module outside test folders
    held_out_tests: list[Module]  # validation: every 20th test module
    duplicates: list[Module]  # in neither: near duplicates of a held-out module


def read_library() -> list[Module]:
    """All modules that are valid UTF-8 and not empty, sorted by path; third-party packages are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        path = file.relative_to(root).as_posix()
        if {"site-packages", "dist-packages"} & set(path.split("/")):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # fixtures that test other encodings
            continue
        if text.strip():
            modules.append(Module(path, text))
    return modules


def long_lines(module: Module) -> set[str]:
    return {line for line in map(str.strip, module.text.splitlines()) if len(line) >= LONG_LINE}


def is_near_duplicate(a: set[str], b: set[str]) -> bool:
    return len(a & b) >= max(DUPLICATE_LINES, DUPLICATE_SHARE * min(len(a), len(b)))


@cache
def split_library() -> Split:
    """Hold out every 20th module, then drop whatever nearly repeats a held-out one from training."""
    modules = read_library()
    held_out, rest = [], []
    for group in ([m for m in modules if not m.is_test], [m for m in modules if m.is_test]):
        chosen = group[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        held_out.append(chosen)
        rest += [m for m in group if m not in chosen]
    held_out_lines = [long_lines(m) for group in held_out for m in group]
    duplicates, library, tests = [], [], []
    for module in rest:
        lines = long_lines(module)
        if any(is_near_duplicate(lines, other) for other in held_out_lines):
            duplicates.append(module)
        else:
            (tests if module.is_test else library).append(module)
    return Split(library, tests, held_out[0], held_out[1], duplicates)


def xz_bits_per_byte(modules: list[Module]) -> float:
    """What `xz -9` needs for the concatenated modules: the general-purpose compressor to compare the models with."""
    data = "".join(m.text for m in modules).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def main() -> None:
    split = split_library()
    for name in ("library", "tests", "held_out", "held_out_tests", "duplicates"):
        modules = getattr(split, name)
        print(f"{name:15s} {len(modules):5d} modules {sum(len(m.text.encode()) for m in modules) / 1e6:7.2f} MB")
    print(f"xz -9: {xz_bits_per_byte(split.held_out):.3f} bits per byte on the held-out modules")
    print("held out:", *(m.path for m in split.held_out))
    print("duplicates:", *(m.path for m in split.duplicates))


if __name__ == "__main__":
    main()
