"""What the Dockerfile promises, read from it; `make image-check` runs it."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from image.dockerfile import Config, Dockerfile, Step, cache_mounts, read
from image.layers import context_files
from typer.main import get_command

from quire import __version__
from quire.server import cli
from quire.server.auth import POLICIES

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("cpu", "cuda")
TEXT = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def file() -> Dockerfile:
    return Dockerfile(TEXT)


def faults(config: Config) -> set[str]:
    """What of an image's configuration an operator would have to work around."""
    found = {
        "root": not re.fullmatch(r"[1-9][0-9]{3,}", config.user),  # a number: clusters check that it is not 0
        "volumes": config.volumes != ("/cache",),
        "entrypoint": not isinstance(config.entrypoint, list) or config.entrypoint[:2] != ["/usr/bin/tini", "--"],
        "command": not isinstance(config.command, list),
        "health": not isinstance(config.health, list),
        "workdir": config.workdir not in config.volumes,
        "home": config.env.get("HOME") not in config.volumes,
    }
    return {name for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_user_on_a_read_only_root_under_an_init(file: Dockerfile, target: str) -> None:
    assert faults(file.config(target)) == set()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text.replace("USER 10001", "USER 0"), "root"),
        (lambda text: text.replace("USER 10001", "USER quire"), "root"),
        (lambda text: text.replace("VOLUME /cache", "VOLUME /cache /data"), "volumes"),
        (lambda text: text.replace('ENTRYPOINT ["/usr/bin/tini", "--", "quire"]', "ENTRYPOINT quire"), "entrypoint"),
        (lambda text: text.replace('CMD ["serve"]', "CMD serve"), "command"),
        (lambda text: text.replace("HOME=/cache", "HOME=/root"), "home"),
        (lambda text: re.sub(r"HEALTHCHECK .*\\\n.*\n", "", text), "health"),
    ],
)
def test_a_planted_fault_is_seen(change: Callable[[str], str], fault: str) -> None:
    changed = change(TEXT)
    assert changed != TEXT
    assert faults(Dockerfile(changed).config("cpu")) == {fault}


@pytest.mark.parametrize("target", TARGETS)
def test_every_base_is_pinned_by_its_digest(file: Dockerfile, target: str) -> None:
    assert re.fullmatch(r"[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}", file.base(target))
    assert "latest" not in file.base(target)


def test_a_build_without_a_target_is_the_one_for_processors(file: Dockerfile) -> None:
    assert file.last == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_what_builds_does_not_come_along(file: Dockerfile, target: str) -> None:
    """The image's own stages install no compiler for C++ and no pip; packages come from another stage."""
    stage, ours = file.stages[target], []
    while stage.name in file.stages:
        ours.append(stage)
        if stage.parent not in file.stages:
            break
        stage = file.stages[stage.parent]
    installs = " ".join(step.value for stage in ours for step in stage.steps if step.name == "RUN")
    assert not re.search(r"g\+\+|pip|build-essential|python3-venv", installs)
    assert "build" in {stage.name for stage in file.needs(target)} - {stage.name for stage in ours}


@pytest.mark.parametrize("target", TARGETS)
def test_package_lists_do_not_stay(file: Dockerfile, target: str) -> None:
    steps = [step for stage in file.needs(target) for step in stage.steps if "apt-get update" in step.value]
    assert len(steps) >= 2
    assert all("rm -rf /var/lib/apt/lists/*" in step.value for step in steps)


@pytest.mark.parametrize("target", TARGETS)
def test_variables_of_the_image_are_options(file: Dockerfile, target: str) -> None:
    """An unknown QUIRE_ variable would be told off at every start."""
    env = file.config(target).env
    options = {f"QUIRE_{option.name}".upper() for option in get_command(cli.app).commands["serve"].params}  # type: ignore[attr-defined]
    assert {name for name in env if name.startswith("QUIRE_")} <= options
    assert env["QUIRE_HOST"] == "0.0.0.0"


@pytest.mark.parametrize("target", TARGETS)
def test_the_health_check_asks_the_port_of_its_own(file: Dockerfile, target: str) -> None:
    config = file.config(target)
    assert isinstance(config.health, list)
    program, flag, code = config.health
    assert (program, flag) == ("python", "-c")
    assert "QUIRE_HEALTH_PORT" in code
    (path,) = re.findall(r"'(/\w+)'", code)
    assert POLICIES[path].probe
    assert POLICIES[path].scope is None
    assert set(config.ports) == {8000, int(config.env["QUIRE_HEALTH_PORT"])}


def test_compose_leaves_the_probes_where_the_health_check_asks(file: Dockerfile) -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
    command = compose["services"]["quire"]["command"]
    told = dict(itertools.pairwise(command)).get("--health-port")
    assert told in (None, file.config("cpu").env["QUIRE_HEALTH_PORT"])


def test_the_health_check_fails_where_nobody_listens(file: Dockerfile) -> None:
    health = file.config("cpu").health
    assert isinstance(health, list)
    env = {"QUIRE_HEALTH_PORT": "1"}
    done = subprocess.run([sys.executable, *health[1:]], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "refused" in done.stderr


def test_a_gpu_image_with_the_wrong_torch_is_not_built(file: Dockerfile) -> None:
    steps = [step.value for step in file.stages["cuda"].steps if step.name == "RUN"]
    assert any("torch.version.cuda" in step for step in steps)


def test_labels_are_those_of_the_open_container_initiative() -> None:
    build_args = {"REVISION": "abc", "CREATED": "2026-01-01T00:00:00Z"}
    labels = read(ROOT / "Dockerfile", build_args).config("cpu").labels
    names = {name.removeprefix("org.opencontainers.image.") for name in labels}
    assert names >= {"title", "description", "licenses", "version", "revision", "created", "base.name"}
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"] == "abc"
    assert labels["org.opencontainers.image.created"] == "2026-01-01T00:00:00Z"


def test_a_gpu_image_says_what_it_wants_of_the_driver(file: Dockerfile) -> None:
    env = file.config("cuda").env
    assert env["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert env["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert re.fullmatch(r"cuda>=\d+\.\d+", env["NVIDIA_REQUIRE_CUDA"])
    assert not {name for name in file.config("cpu").env if "NVIDIA" in name}


def test_a_linter_agrees() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter, "hadolint comes with the test extra"
    command = [linter, "--config", str(ROOT / ".hadolint.yaml"), str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# what a build gets to see


def test_a_build_gets_every_package_and_nothing_else() -> None:
    context = context_files(ROOT)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in packages:
        folder = package.removeprefix("quire").strip(".").replace(".", "/")
        assert str(Path(folder) / "__init__.py") in context or folder == "kernels/cpu/native", package
    assert {"pyproject.toml", "README.md", "LICENSE", "kernels/cpu/native/src/api.cpp"} <= set(context)
    folders = {path.partition("/")[0] for path in context if "/" in path}
    assert folders == {"bench", "deploy", "engine", "kernels", "models", "scheduler", "server"}
    assert not [path for path in context if path.endswith((".so", ".pyc")) or path.startswith("deploy/k")]


def test_what_lies_around_stays_outside(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    for path in ("engine/core.py", "engine/x.so", "engine/__pycache__/core.pyc", "keys.yaml", ".env", ".git/config"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert context_files(tmp_path) == [".dockerignore", "engine/core.py"]


# how it is read


def test_reading() -> None:
    text = """
ARG BASE=debian:x
FROM ${BASE} AS one
ARG A=1
ENV B=2 C="three $A"
RUN --mount=type=cache,target=/c --network=none true \\
 && false
FROM one AS two
COPY --from=other /x /y
FROM scratch AS other
ENTRYPOINT ["a"]
FROM two
"""
    file = Dockerfile(text, {"A": "7"})
    assert file.stages["one"].parent == "debian:x"
    assert file.last == "3"
    assert [stage.name for stage in file.needs("3")] == ["one", "two", "other", "3"]
    assert file.config("3").env == {"B": "2", "C": "three 7"}
    assert file.config("other").entrypoint == ["a"]
    (_, _, run) = file.stages["one"].steps
    assert (run.name, run.value) == ("RUN", "true  && false")
    assert cache_mounts(run) == ["/c"]
    with pytest.raises(ValueError, match="nobody here knows"):
        file.after(Config(), Step("ONBUILD", ""))
    with pytest.raises(ValueError, match="without FROM"):
        Dockerfile("# nothing")
