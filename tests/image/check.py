"""`make image-check`: the Dockerfile is linted, its CPU image built and run, on a machine that has no Docker.

    python tests/image/check.py [--again]

The base image is stood for by a fresh Debian of the same release, made by debootstrap once and kept. On it the very
instructions of the Dockerfile are run (layers.py), so the check cannot drift from the file. The image then serves as a
container without privileges, network or a root that it could write to (container.py). --again leaves out the build and
runs what the last one made.

    IMAGE_CHECK_FOLDER   where roots, layers and pip's cache are kept (/var/tmp/quire-image-check)
    IMAGE_CHECK_BIND     paths of this machine that the build may read, separated by colons
    IMAGE_CHECK_MIRROR   of Debian, where it is not to be debootstrap's own
    PIP_…                are passed to the build as they are, in place of the file's arguments of these names

Needs root, Linux, and debootstrap. Exit status 0: everything held; otherwise what did not is said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from image.container import Container  # noqa: E402
from image.dockerfile import Config, read  # noqa: E402
from image.layers import Layers  # noqa: E402

TARGET = "cpu"
KEY = "image-check-key"
START_SECONDS = 900  # for the bundled model, on a machine with much else to do
STOP_SECONDS = 60  # more than --drain-timeout

# What makes a slim image of a Debian: nothing that was downloaded stays, and nothing to read.
AS_IN_DEBIANS_OWN = {
    "etc/apt/apt.conf.d/docker-clean": 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };\n',
    "etc/dpkg/dpkg.cfg.d/docker": "".join(
        f"path-exclude /usr/share/{name}/*\n" for name in ("doc", "info", "locale", "man")
    ),
}

PACKAGE = "/opt/quire/lib/python3*/site-packages/quire"

# Run inside, with the image's own Python: it has no other client, and the container no network but its own.
ASK = """
import json, sys, urllib.error, urllib.request
path, key, body = sys.argv[1:]
headers = {"Content-Type": "application/json"} | ({"Authorization": "Bearer " + key} if key else {})
request = urllib.request.Request("http://127.0.0.1:8000" + path, body.encode() or None, headers)
try:
    answer = urllib.request.urlopen(request, timeout=120)
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps([answer.status, answer.read().decode()]))
"""
# What the container's user could write to, on the root's file system or as the place of another one.
WRITABLE = "find / -xdev -writable -not -type l 2>/dev/null"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--again", action="store_true")
    again = options.parse_args().again
    if os.geteuid() != 0:
        sys.exit("image-check: chroot and mount want root; run it as root")
    folder = Path(os.environ.get("IMAGE_CHECK_FOLDER", "/var/tmp/quire-image-check"))
    passed = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    binds = [Path(path) for path in os.environ.get("IMAGE_CHECK_BIND", "").split(":") if path]
    file = read(ROOT / "Dockerfile", build_args=passed)

    lint()
    layers = Layers(folder, debian(file.base(TARGET), folder), binds, passed)
    image = layers.found(file, TARGET) if again else layers.build(file, TARGET, ROOT)
    for name, size in layers.size(TARGET).items():
        print(f"  {size / 1e6:6.0f} MB  {name}")

    config = file.config(TARGET)
    check = Check(folder / "containers", image, config)
    check.contents()
    check.refuses_to_serve_without_a_key()
    check.refuses_nonsense()
    check.serves_without_privileges()
    check.serves_as_any_user()
    print("image-check: all held")


def lint() -> None:
    subprocess.run(["hadolint", "--config", str(ROOT / ".hadolint.yaml"), str(ROOT / "Dockerfile")], check=True)


def debian(image: str, folder: Path) -> Path:
    """A root of the release that `image` is of: debian:bookworm-20260824-slim@sha256:…"""
    found = re.fullmatch(r"debian:([a-z]+)-[0-9]+-slim@sha256:[0-9a-f]{64}", image)
    if found is None:
        sys.exit(f"image-check: the base is {image}, and only a Debian can be made here")
    release = found[1]
    root = folder / release / "base"
    if not (root / "complete").exists():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        mirror = [os.environ["IMAGE_CHECK_MIRROR"]] if "IMAGE_CHECK_MIRROR" in os.environ else []
        command = ["debootstrap", "--variant=minbase", release, str(root), *mirror]
        subprocess.run(command, check=True, stdout=sys.stderr)
        for name, text in AS_IN_DEBIANS_OWN.items():
            (root / name).write_text(text)
        sources = root / "etc/apt/sources.list"
        _, archive, *_ = sources.read_text().split()  # what debootstrap took: deb ARCHIVE RELEASE main
        sources.write_text(
            f"deb {archive} {release} main\n"
            f"deb {archive} {release}-updates main\n"
            f"deb {archive.rstrip('/')}-security {release}-security main\n"
        )
        (root / "complete").touch()
    return root


class Check:
    """Each method is one promise of the image; it ends the program where that is not kept."""

    def __init__(self, folder: Path, image: list[Path], config: Config) -> None:
        self._folder = folder
        self._image = image
        self._config = config

    def contents(self) -> None:
        """The compiled kernels are there, without which an install would go on; what built them is not."""
        with self._container(env={"QUIRE_API_KEY": KEY}) as container:
            native = container.execute(["sh", "-c", f"ls {PACKAGE}/kernels/cpu/native"])
            expect("_kernels." in native.stdout, f"the compiled kernels are missing: {native.stdout}")
            strange = container.execute(["sh", "-c", f"command -v g++ gcc cc pip git curl; ls -d /src {PACKAGE}/tests"])
            expect(not strange.stdout.strip(), f"in the image without being of use: {strange.stdout}")
        said("compiled kernels are there; compilers, pip and tests are not")

    def refuses_to_serve_without_a_key(self) -> None:
        with self._container() as container:
            status = container.wait(START_SECONDS)
            lines = container.log.strip().splitlines()
        expect(status == 2, f"without a key the container ended with {status}, not 2")
        expect(len(lines) == 1 and "QUIRE_API_KEY" in lines[0], f"without a key it said {lines}")
        said(f"without a key: exit status 2 and {lines[0]!r}")

    def refuses_nonsense(self) -> None:
        """The variable that a cluster sets for a service named quire, and a file that is not there."""
        for command, env, named in (
            (["serve"], {"QUIRE_PORT": "tcp://10.0.0.1:8000"}, "--port"),
            (["serve", "--config", "/nowhere.yaml"], {}, "/nowhere.yaml"),
        ):
            with self._container(command, {"QUIRE_API_KEY": KEY, **env}) as container:
                status = container.wait(START_SECONDS)
                lines = container.log.strip().splitlines()
                expect(status == 2 and len(lines) == 1, f"{named} ended it with {status}: {lines}")
                expect(named in lines[0], f"{named} is not named: {lines}")
        said("settings that are nonsense: exit status 2, and they are named")

    def serves_without_privileges(self) -> None:
        with self._container(env={"QUIRE_API_KEY": KEY}) as container:
            self._wait_until_healthy(container)
            first = Path(f"/proc/{container.first_process()}")
            expect((first / "comm").read_text().strip() == "tini", "the first process is not the init")
            everybody = container.execute(["sh", "-c", "cat /proc/[0-9]*/status"]).stdout
            users = set(re.findall(r"^Uid:\t(\d+)", everybody, re.M))
            expect(users == {self._config.user}, f"processes run as {users}")
            expect(set(re.findall(r"^CapEff:\t0*(\w+)", everybody, re.M)) == {"0"}, "a process has capabilities")
            writable = container.execute(["sh", "-c", WRITABLE]).stdout.split()
            expect(writable == [*self._config.volumes], f"written could be to {writable}")
            self._answers(container)
            status = container.stop(STOP_SECONDS)
        expect(status == 0, f"after SIGTERM the container ended with {status}:\n{container.log}")
        said("served as a user without privileges, on a read-only root, and ended with 0 when told to")

    def serves_as_any_user(self) -> None:
        """As clusters do that give a container a user id of their own, and group 0."""
        config = Config(**{**vars(self._config), "user": "1000680000"})
        with self._container(env={"QUIRE_API_KEY": KEY}, config=config) as container:
            self._wait_until_healthy(container)
            self._answers(container)
        said("served as a user id that the image does not know")

    def _answers(self, container: Container) -> None:
        body = json.dumps({"prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0})
        status, text = self._ask(container, "/v1/completions", KEY, body)
        expect(status == 200 and json.loads(text)["choices"][0]["text"], f"a completion was answered {status}: {text}")
        status, text = self._ask(container, "/", "", "")
        expect(status == 200 and "<html" in text, f"the page of the engine at work was answered {status}: {text}")
        status, text = self._ask(container, "/v1/completions", "", body)
        expect(status == 401, f"a completion without a key was answered {status}: {text}")

    def _ask(self, container: Container, path: str, key: str, body: str) -> tuple[int, str]:
        done = container.execute(["python", "-c", ASK, path, key, body])
        expect(done.returncode == 0, f"nobody answers {path}: {done.stderr}\n{container.log}")
        status, text = json.loads(done.stdout)
        return status, text

    def _wait_until_healthy(self, container: Container) -> None:
        """By the image's own health check, which has to fail while nothing listens."""
        health: Any = self._config.health
        expect(container.execute(health).returncode == 1, "the health check held before the server was there")
        deadline = time.monotonic() + START_SECONDS
        while container.execute(health).returncode != 0:
            expect(time.monotonic() < deadline, f"not healthy after {START_SECONDS} s:\n{container.log}")
            time.sleep(0.5)

    @contextmanager
    def _container(
        self, command: list[str] | None = None, env: dict[str, str] | None = None, config: Config | None = None
    ) -> Iterator[Container]:
        """With a new volume."""
        shutil.rmtree(self._folder, ignore_errors=True)
        volume = self._folder / "volume"
        volume.mkdir(parents=True)
        volume.chmod(0o775)
        with Container(self._folder, self._image, config or self._config, volume, command, env) as container:
            yield container


def expect(held: bool, otherwise: str) -> None:
    if not held:
        sys.exit(f"image-check: {otherwise}")


def said(what: str) -> None:
    print(f"  ok  {what}", flush=True)


if __name__ == "__main__":
    main()
