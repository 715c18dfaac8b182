"""A Dockerfile as data: its stages, which of them a target needs, and the configuration of the image that comes out.

Parsing is dockerfile-parse's. The check that runs the steps (check.py) and the tests of what the file promises
(test_dockerfile.py) read it here, so both judge the same thing.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import get_key_val_dictionary


@dataclass(frozen=True)
class Step:
    """One instruction: `RUN --mount=type=cache,target=/x true` has the flag mount and the value `true`."""

    name: str
    value: str
    flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """`parent` is another stage's name, or an image."""

    name: str
    parent: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Config:
    """What an image says about a container of it. Lists are exec forms; None = not said; a string = shell form."""

    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    args: Mapping[str, str] = field(default_factory=dict)  # of the stage, for what stands behind them
    user: str = "0"
    workdir: str = "/"
    volumes: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    entrypoint: list[str] | str | None = None
    command: list[str] | str | None = None
    health: list[str] | str | None = None


class Dockerfile:
    def __init__(self, text: str, build_args: Mapping[str, str] | None = None) -> None:
        """`build_args` win over the file's defaults, as those of a build do. ValueError for a file without FROM."""
        self._build_args = dict(build_args or {})
        self._global_args: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}
        for step in _steps(text):
            if step.name == "FROM":
                self._begin(step)
            elif self.stages:
                stage = next(reversed(self.stages.values()))
                self.stages[stage.name] = replace(stage, steps=(*stage.steps, step))
            elif step.name == "ARG":
                self._global_args |= self._argument(step, self._global_args)
        if not self.stages:
            raise ValueError("a Dockerfile without FROM")

    @property
    def last(self) -> str:
        """The target of a build that names none."""
        return next(reversed(self.stages))

    def needs(self, target: str) -> list[Stage]:
        """The stages of which `target` is made, itself included, in the file's order."""
        wanted = {target}
        for stage in reversed(self.stages.values()):
            if stage.name in wanted:
                wanted |= {stage.parent, *(step.flags["from"] for step in stage.steps if "from" in step.flags)}
        return [stage for stage in self.stages.values() if stage.name in wanted]

    def base(self, target: str) -> str:
        """The image that everything of `target` begins with."""
        while target in self.stages:
            target = self.stages[target].parent
        return target

    def config(self, target: str) -> Config:
        """As the instructions of `target` and its parents add up."""
        stage = self.stages[target]
        config = self.config(stage.parent) if stage.parent in self.stages else Config()
        config = replace(config, args={})
        for step in stage.steps:
            config = self.after(config, step)
        return config

    def after(self, config: Config, step: Step) -> Config:
        """What `step` makes of it."""
        known = {**config.args, **config.env}
        value = step.value
        match step.name:
            case "ENV":
                return replace(config, env={**config.env, **_pairs(value, known)})
            case "LABEL":
                return replace(config, labels={**config.labels, **_pairs(value, known)})
            case "ARG":
                return replace(config, args={**config.args, **self._argument(step, known)})
            case "USER":
                return replace(config, user=value)
            case "WORKDIR":
                return replace(config, workdir=value)
            case "VOLUME":
                return replace(config, volumes=(*config.volumes, *value.split()))
            case "EXPOSE":
                return replace(config, ports=(*config.ports, *(int(port) for port in value.split())))
            case "ENTRYPOINT":
                return replace(config, entrypoint=command(value), command=None)
            case "CMD":
                return replace(config, command=command(value))
            case "HEALTHCHECK":
                return replace(config, health=command(value.strip().removeprefix("CMD").strip()))
            case "RUN" | "COPY":
                return config
        raise ValueError(f"{step.name} is an instruction that nobody here knows")

    def _begin(self, step: Step) -> None:
        image, _, name = step.value.partition(" AS ")
        for argument, default in self._global_args.items():
            image = image.replace("${" + argument + "}", default)
        name = name or str(len(self.stages))
        self.stages[name] = Stage(name, image, ())

    def _argument(self, step: Step, known: Mapping[str, str]) -> dict[str, str]:
        name, equals, default = step.value.partition("=")
        if name in self._build_args:
            return {name: self._build_args[name]}
        return _pairs(step.value, known) if equals else {name: self._global_args.get(name, default)}


def _steps(text: str) -> list[Step]:
    parser = DockerfileParser(fileobj=io.BytesIO(text.encode()), env_replace=False)
    return [
        Step(line["instruction"], *_without_flags(line["value"]))
        for line in parser.structure
        if line["instruction"] != "COMMENT"
    ]


def _without_flags(value: str) -> tuple[str, dict[str, str]]:
    flags = {}
    while (value := value.lstrip()).startswith("--"):
        flag, _, value = value.partition(" ")
        name, _, what = flag.removeprefix("--").partition("=")
        flags[name] = what
    return value, flags


def _pairs(value: str, known: Mapping[str, str]) -> dict[str, str]:
    pairs: dict[str, str] = get_key_val_dictionary(value, env_replace=True, args=dict(known), envs={})
    return pairs


def command(value: str) -> list[str] | str:
    """The exec form is JSON; whatever is none is for a shell."""
    try:
        return [str(part) for part in json.loads(value)]
    except ValueError:
        return value


def cache_mounts(step: Step) -> list[str]:
    """Where a RUN wants a folder that outlives it."""
    mounts = (dict(part.partition("=")[::2] for part in flag.split(",")) for flag in step.flags.values())
    return [mount["target"] for mount in mounts if mount.get("type") == "cache"]


def sources(step: Step) -> tuple[list[str], str]:
    """Of a COPY: what, and to where."""
    *what, where = shlex.split(step.value)
    return what, where


def read(path: Path, build_args: Mapping[str, str] | None = None) -> Dockerfile:
    return Dockerfile(path.read_text(encoding="utf-8"), build_args)
