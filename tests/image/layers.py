"""The steps of a Dockerfile, run without Docker: every stage is a layer on its parent's, by the kernel's overlayfs.

A RUN is `/bin/sh -c` in a chroot of its own namespaces, with the environment that Docker would give it. What is mounted
for it is gone with it. Needs root on Linux.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from docker.utils.build import exclude_paths
from image.dockerfile import Config, Dockerfile, Stage, Step, cache_mounts, command, sources

NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child")


class Layers:
    """folder       where layers and caches lie
    base         a root file system that stands for the base image
    binds        paths of this machine that steps see at the same place, read-only: mirrors, certificates
    passed       variables of this machine that steps see
    """

    def __init__(self, folder: Path, base: Path, binds: Sequence[Path], passed: Mapping[str, str]) -> None:
        self._folder = folder
        self._binds = [Path("/etc/resolv.conf"), *binds]
        self._passed = dict(passed)
        self._of: dict[str, list[Path]] = {}  # by stage, the topmost first
        self._base = base
        for path in self._binds:  # so that no layer gets an empty place for them
            _make_place(base, path)

    def build(self, dockerfile: Dockerfile, target: str, context: Path) -> list[Path]:
        """The layers of `target`, the topmost first. Raises CalledProcessError for the first step that fails."""
        for stage in dockerfile.needs(target):
            self._build(dockerfile, stage, context)
        return self._of[target]

    def found(self, dockerfile: Dockerfile, target: str) -> list[Path]:
        """The layers that the last `build` made. FileNotFoundError where one is missing."""
        for stage in dockerfile.needs(target):
            upper = self._folder / "stages" / stage.name / "upper"
            if not upper.is_dir():
                raise FileNotFoundError(f"{upper}: build first")
            self._of[stage.name] = [upper, *self._of.get(stage.parent, [self._base])]
        return self._of[target]

    def size(self, target: str) -> dict[str, int]:
        """Bytes of each layer, by its name."""
        return {layer.parent.name: _bytes(layer) for layer in self._of[target]}

    def _build(self, dockerfile: Dockerfile, stage: Stage, context: Path) -> None:
        below = self._of.get(stage.parent, [self._base])
        place = self._folder / "stages" / stage.name
        shutil.rmtree(place, ignore_errors=True)
        for name in ("upper", "work", "root"):
            (place / name).mkdir(parents=True)
        self._of[stage.name] = [place / "upper", *below]
        config = dockerfile.config(stage.parent) if stage.parent in dockerfile.stages else Config()
        config = Config(**{**vars(config), "args": {}})
        for step in stage.steps:
            _say(f"{stage.name:12} {step.name} {step.value[:90]}")
            config = dockerfile.after(config, step)
            if step.name == "RUN":
                self._run(stage, step, config)
            elif step.name == "COPY":
                self._copy(stage, step, config, context)
            elif step.name == "WORKDIR":
                self._inside(stage, ["mkdir", "-p", config.workdir])

    def _run(self, stage: Stage, step: Step, config: Config) -> None:
        mounts = {}
        for target in cache_mounts(step):
            mounts[target] = self._folder / "caches" / target.strip("/").replace("/", "-")
            mounts[target].mkdir(parents=True, exist_ok=True)
        variables = {**config.args, **self._passed, **config.env}
        argv = command(step.value)
        self._inside(stage, argv if isinstance(argv, list) else ["/bin/sh", "-c", argv], mounts, variables, config)

    def _copy(self, stage: Stage, step: Step, config: Config, context: Path) -> None:
        """From another stage by its layers; from the context what .dockerignore lets through."""
        what, where = sources(step)
        target = f"$ROOT/{os.path.join(config.workdir, where).strip('/')}"
        script = [f'mkdir -p "{target}"']
        if "from" in step.flags:
            (source,) = what
            script += ["OTHER=$(mktemp -d)", mount_overlay("$OTHER", self._of[step.flags["from"]])]
            script += [f'cp -a "$OTHER{source}/." "{target}"']
        else:
            pack = f"tar --create --directory {shlex.quote(str(context))} --owner 0 --group 0 --null --files-from -"
            script += [f'{pack} | tar --extract --directory "{target}"']
        files = "\0".join(f"./{path}" for path in context_files(context)).encode()
        self._unshared(stage, "\n".join(script), files)

    def _inside(
        self,
        stage: Stage,
        command: list[str],
        mounts: Mapping[str, Path] | None = None,
        variables: Mapping[str, str] | None = None,
        config: Config | None = None,
    ) -> None:
        """`command` in the stage's root, with caches and binds at their places."""
        config = config or Config()
        script = [
            "mount -t proc proc $ROOT/proc",
            "mount --rbind /dev $ROOT/dev",
            *(
                f'mkdir -p "$ROOT{where}"; mount --bind {folder} "$ROOT{where}"'
                for where, folder in (mounts or {}).items()
            ),
            *(f'mount --bind {path} "$ROOT{path}"; mount -o remount,bind,ro "$ROOT{path}"' for path in self._binds),
        ]
        values = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **(variables or {})}
        assigned = [f"{name}={value}" for name, value in values.items()]
        run = [
            "chroot",
            "--userspec",
            f"{config.user}:0",
            "ROOT",
            "env",
            "-i",
            "-C",
            config.workdir,
            *assigned,
            *command,
        ]
        script.append("exec " + shlex.join(run).replace(" ROOT ", ' "$ROOT" ', 1))
        self._unshared(stage, "\n".join(script))

    def _unshared(self, stage: Stage, script: str, standard_input: bytes = b"") -> None:
        place = self._folder / "stages" / stage.name
        upper, *below = self._of[stage.name]
        lines = [
            f"ROOT={shlex.quote(str(place / 'root'))}",
            "mount --make-rprivate /",
            mount_overlay("$ROOT", below, upper, place / "work"),
            script,
        ]
        command = ["unshare", *NAMESPACES, "sh", "-euc", "\n".join(lines)]
        subprocess.run(command, input=standard_input, check=True, stdout=sys.stderr)


def mount_overlay(where: str, lower: Sequence[Path], upper: Path | None = None, work: Path | None = None) -> str:
    """The command of a shell; without `upper` it is read-only. Alone, a layer is no overlay but a bind."""
    if upper is None and len(lower) == 1:
        return f'mount --bind {lower[0]} "{where}"; mount -o remount,bind,ro "{where}"'
    options = "lowerdir=" + ":".join(str(layer) for layer in lower)
    if upper is not None:
        options += f",upperdir={upper},workdir={work}"
    return f'mount -t overlay overlay -o {shlex.quote(options)} "{where}"'


def context_files(context: Path) -> list[str]:
    """What `COPY . .` copies: the files that .dockerignore leaves, by Docker's own client's reading of it."""
    patterns = (context / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line.strip() for line in patterns if line.strip() and not line.startswith("#")]
    return sorted(path for path in exclude_paths(str(context), rules) if not (context / path).is_dir())


def _make_place(root: Path, path: Path) -> None:
    place = root / path.relative_to("/")
    if path.is_dir():
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


def _bytes(folder: Path) -> int:
    done = subprocess.run(["du", "--bytes", "--summarize", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
