"""Limits of containers, from files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.engine import cgroup

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)
UNLIMITED_V1 = 9223372036854771712


def system(root: Path, mounts: str, groups: str, **files: object) -> Path:
    """A file system with these mounts, this process in these groups, and files under /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text("23 1 8:1 / / rw - ext4 /dev/sda rw\n" + mounts)
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def group(folder: str, **files: object) -> dict[str, object]:
    """The files of one group: `a__b` stands for a.b."""
    return {f"{folder}/{name.replace('__', '.')}": content for name, content in files.items()}


def test_version_2_down_the_whole_path(tmp_path: Path) -> None:
    """The service may use more than the slice above it leaves."""
    root = system(
        tmp_path,
        V2,
        "0::/serve.slice/quire.service\n",
        **group("serve.slice/quire.service", cpu__max="max 100000", memory__max="max", memory__current=70),
        **group("serve.slice", cpu__max="250000 100000", memory__max=1000, memory__current=900),
    )
    assert cgroup.processors(root) == 2.5
    assert cgroup.memory(root) == 100


def test_the_tightest_group_decides(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        V2,
        "0::/a/b\n",
        **group("a/b", cpu__max="50000 100000", memory__max=500, memory__current=100),
        **group("a", cpu__max="400000 100000", memory__max=2000, memory__current=200),
    )
    assert cgroup.processors(root) == 0.5
    assert cgroup.memory(root) == 400


def test_version_1(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        V1,
        "5:memory:/box/inner\n3:cpu,cpuacct:/box\n0::/\n",
        **group("cpu,cpuacct/box", **{"cpu__cfs_quota_us": 150000, "cpu__cfs_period_us": 100000}),
        **group("cpu,cpuacct", **{"cpu__cfs_quota_us": -1, "cpu__cfs_period_us": 100000}),
        **group("memory/box/inner", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes=10),
        **group("memory/box", memory__limit_in_bytes=4096, memory__usage_in_bytes=1024),
    )
    assert cgroup.processors(root) == 1.5
    assert cgroup.memory(root) == 3072


def test_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    """The path is the host's; the mount shows the group itself, or tells what it shows."""
    for number, (shown, path) in enumerate((("/", "/docker/77ab"), ("/docker/77ab", "/docker/77ab/worker"))):
        mounts = f"35 31 0:32 {shown} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
        root = system(
            tmp_path / str(number),
            mounts,
            f"5:memory:{path}\n",
            **group("memory", memory__limit_in_bytes=4096, memory__usage_in_bytes=96),
            **group("memory/worker", memory__limit_in_bytes=2048, memory__usage_in_bytes=48),
        )
        assert cgroup.memory(root) == (4000, 2000)[number]


@pytest.mark.parametrize(
    ("stat", "expected"),
    [("anon 5\ninactive_file 300\nactive_file 9", 400), ("inactive_file 1\ntotal_inactive_file 200", 300), ("", 100)],
)
def test_idle_file_pages_are_free(stat: str, expected: int, tmp_path: Path) -> None:
    """A model that was read once has filled the group with pages that the kernel gives away."""
    files = group("a", memory__max=1000, memory__current=900, memory__stat=stat)
    assert cgroup.memory(system(tmp_path, V2, "0::/a\n", **files)) == expected


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    files = group("a", memory__max=1000, memory__current=1200)
    assert cgroup.memory(system(tmp_path, V2, "0::/a\n", **files)) == 0


@pytest.mark.parametrize(
    "files",
    [
        {},
        group("a", cpu__max="max 100000", memory__max="max", memory__current=1),
        group("a", cpu__max="", memory__max="", memory__current=""),
        group("a", cpu__max="100000 0", memory__max="much", memory__current=1),
    ],
)
def test_no_limit(files: dict[str, object], tmp_path: Path) -> None:
    root = system(tmp_path, V2, "0::/a\n", **files)
    assert cgroup.processors(root) is None
    assert cgroup.memory(root) is None


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cgroup.processors(tmp_path) is None
    assert cgroup.memory(tmp_path) is None
    assert cgroup.memory(system(tmp_path, "", "0::/\n")) is None


def test_this_machine() -> None:
    assert cgroup.processors() is None or cgroup.processors() > 0  # type: ignore[operator]
    assert cgroup.memory() is None or cgroup.memory() > 0  # type: ignore[operator]
