"""What the control groups of a container leave to this process: processors and memory, in versions 1 and 2.

    /proc/self/mountinfo ─ where each hierarchy is ──┐
    /proc/self/cgroup ──── where the process is in it ┴─▶ its folder and all above ─▶ the tightest of their limits

Of a hierarchy that a container sees only from its own group on, the path of the process leads nowhere; the folders that
there are decide (cgroups(7); Documentation/admin-guide/cgroup-v2.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def processors(root: Path = ROOT) -> float | None:
    """Processors' worth of time that may be used, 1.5 for one and a half; None = no group has a limit."""
    shares = []
    for folder in _folders("cpu", root):
        quota, period = _cpu_time(folder)
        if quota is not None and period and quota > 0:
            shares.append(quota / period)
    return min(shares, default=None)


def memory(root: Path = ROOT) -> int | None:
    """Bytes that may still be taken; None = no group has a limit. File pages that nobody uses count as free."""
    left = []
    for folder in _folders("memory", root):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            left.append(max(0, limit - used + _idle_file_bytes(folder)))
    return min(left, default=None)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Of every hierarchy that has the controller: the folders from the process's own up to the topmost."""
    mounts = dict(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        _, names, path = line.split(":", 2)
        name = next((name for name in names.split(",") if name == controller), None if names else "cgroup2")
        if name not in mounts:
            continue
        top, shown_from = mounts[name]
        inside = PurePosixPath(path)
        if inside.is_relative_to(shown_from):
            inside = inside.relative_to(shown_from)
        own = top / str(inside).lstrip("/")
        for folder in (own, *own.parents):
            yield folder
            if folder == top:
                break


def _mounts(root: Path) -> Iterator[tuple[str, tuple[Path, PurePosixPath]]]:
    """Of each controller of version 1, and of "cgroup2": where it is mounted, and which group that shows (proc(5))."""
    for line in _lines(root / "proc/self/mountinfo"):
        place, _, kind = line.partition(" - ")
        fields, (fstype, _, options) = place.split(), (*kind.split(), "", "", "")[:3]
        where = root / fields[4].lstrip("/"), PurePosixPath(fields[3])
        if fstype == "cgroup2":
            yield "cgroup2", where
        elif fstype == "cgroup":
            yield from ((name, where) for name in options.split(","))


def _cpu_time(folder: Path) -> tuple[int | None, int | None]:
    """Microseconds that may be used of each period of so many."""
    both = " ".join(_lines(folder / "cpu.max")).split()
    if len(both) == 2:
        return _integer(both[0]), _integer(both[1])
    return _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")


def _idle_file_bytes(folder: Path) -> int:
    """Of what the group uses, what the kernel takes back first. Version 1 tells the groups below by `total_`."""
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if " " in line)
    return _integer(stat.get("total_inactive_file", stat.get("inactive_file", ""))) or 0


def _number(*files: Path) -> int | None:
    """Of the first of some files that is there; None where it says "max"."""
    return next((_integer(lines[0]) for file in files if (lines := _lines(file))), None)


def _integer(text: str) -> int | None:
    return int(text) if text.strip().lstrip("-").isdigit() else None


def _lines(file: Path) -> list[str]:
    """Empty for a file that is not there or may not be read."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
