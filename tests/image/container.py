"""A container of layers, run without Docker as `docker run --read-only --network none --cap-drop ALL --user … \
--security-opt no-new-privileges --volume FOLDER:/cache` would run it: namespaces, a read-only root, no privileges.

Nothing of it outlives `Container`: its first process is the first of a process namespace, and mounts are its own.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from image.dockerfile import Config
from image.layers import mount_overlay

NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--net", "--fork", "--kill-child")
DEVICES = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}  # minor numbers of major 1
SHM = "64m"  # Docker's own default


class Container:
    """folder    for this container alone: its mount point and its log
    layers    of its root, the topmost first
    volume    of this machine, for the image's one volume
    command   in place of the image's own; `env` beside the image's own
    """

    def __init__(
        self,
        folder: Path,
        layers: Sequence[Path],
        config: Config,
        volume: Path,
        command: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(config.entrypoint, list) or not isinstance(config.command, list):
            raise ValueError("the image has no entrypoint and command in exec form")
        self._config = config
        self._env = {**config.env, **(env or {})}
        self._log = folder / "log"
        self._root = root = folder / "root"
        root.mkdir(parents=True, exist_ok=True)
        os.chown(volume, int(config.user), 0)
        (where,) = config.volumes
        argv = [*config.entrypoint, *(config.command if command is None else command)]
        script = [
            f"ROOT={shlex.quote(str(root))}",
            "mount --make-rprivate /",
            mount_overlay("$ROOT", layers),
            'mount -t proc -o nosuid,nodev,noexec proc "$ROOT/proc"',
            'mount -t tmpfs -o mode=755,nosuid tmpfs "$ROOT/dev"',
            *(f'mknod -m 666 "$ROOT/dev/{name}" c 1 {minor}' for name, minor in DEVICES.items()),
            'ln -s /proc/self/fd "$ROOT/dev/fd"; mkdir "$ROOT/dev/shm"',
            f'mount -t tmpfs -o mode=1777,nosuid,nodev,noexec,size={SHM} tmpfs "$ROOT/dev/shm"',
            'mount -o remount,ro "$ROOT/dev"',
            f'mount --bind {shlex.quote(str(volume))} "$ROOT{where}"',
            "ip link set lo up",
            f'exec chroot "$ROOT" {shlex.join(self._unprivileged(argv))}',
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", *NAMESPACES, "sh", "-euc", "\n".join(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # and with it the namespace's first process, and with that all others
        self._process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def first_process(self) -> int:
        """As this machine numbers it, once it has the container's root. RuntimeError if the container has ended."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while self._process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                for found in children.read_text().split():
                    if os.readlink(f"/proc/{found}/root") == str(self._root):
                        return int(found)
            time.sleep(0.02)
        raise RuntimeError(f"the container ended with {self._process.returncode}:\n{self.log}")

    def execute(self, argv: Sequence[str], user: str | None = None) -> subprocess.CompletedProcess[str]:
        """As `docker exec` does."""
        target = str(self.first_process())
        enter = ["nsenter", "--target", target, "--mount", "--pid", "--uts", "--ipc", "--net", "--root", "--wdns=/"]
        return subprocess.run([*enter, *self._unprivileged(argv, user)], capture_output=True, text=True)

    def stop(self, seconds: float) -> int:
        """As `docker stop` does: SIGTERM to the first process; its exit status."""
        os.kill(self.first_process(), signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)

    def _unprivileged(self, argv: Sequence[str], user: str | None = None) -> list[str]:
        drop = ["setpriv", "--reuid", user or self._config.user, "--regid", "0", "--clear-groups", "--no-new-privs"]
        drop += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        assigned = [f"{name}={value}" for name, value in self._env.items()]
        return [*drop, "env", "-i", "-C", self._config.workdir, *assigned, *argv]
