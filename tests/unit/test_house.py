"""The rules that hold the house together, read from the source: who imports whom, and what nobody does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("server", "engine", "scheduler", "kernels", "models", "bench", "deploy")
SOURCES = sorted(ROOT.glob("*.py")) + sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# What a package may import of its siblings. `bench` measures from outside; `server` reaches into it for `quire bench`.
MAY_IMPORT = {
    "server": {"server", "engine", "bench"},
    "engine": {"engine", "scheduler", "kernels"},
    "scheduler": {"scheduler"},
    "kernels": {"kernels"},
    "models": {"models"},
    "bench": {"bench", "engine", "scheduler", "kernels", "models"},
    "deploy": {"deploy", "server", "engine", "scheduler", "bench"},
}
# Plain data that crosses every layer unchanged.
CONTRACTS = ("quire.scheduler.params.", "quire.scheduler.plan.", "quire.scheduler.step_time.")
EXCEPTIONS = {("server/cli_doctor.py", "kernels")}  # it reports which kernels this machine would run

KERNEL_LIBRARIES = {"torch", "numpy", "triton"}
SERVER_LIBRARIES = {"fastapi", "starlette", "uvicorn", "pydantic", "zmq"}
WIRE_FILES = {"engine/process.py", "engine/client.py"}

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_NAMES = {"eval", "exec"}
FORBIDDEN_CALLS = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "numpy.load",
}

# Paths of one machine, and hosts that packages come from: a checkout must mean the same everywhere.
MACHINE = re.compile(
    r"/(?:work|home|Users)/\w|/opt/py\w|\bpy(?:pi|thon-?hosted|torch)\.org\b|\banaconda\.org\b", re.IGNORECASE
)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".cfg", ".sh", ".txt", ".h", ".cpp", ".c", ""}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name(path))


def imports(path: Path, *, anywhere: bool = True) -> Iterator[tuple[str, int]]:
    """(absolute dotted name with `quire` in front where it is ours, line) of every import, or of module-level ones.

    Imports under `if TYPE_CHECKING:` do not run, so they are module-level only when `anywhere`.
    """
    package = ("quire", *path.relative_to(ROOT).parts[:-1])
    tree = parse(path)
    nodes = list(ast.walk(tree)) if anywhere else [n for top in tree.body for n in _runs_on_import(top)]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            if node.level and node.level > len(package):
                raise AssertionError(f"{name(path)}:{node.lineno} imports from above the package")
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def _runs_on_import(node: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _runs_on_import(child)  # type: ignore[arg-type]


def of_package(package: str) -> list[Path]:
    return [path for path in SOURCES if name(path).startswith(package + "/")]


def top(module: str) -> str:
    return module.split(".")[0]


def test_there_is_something_to_read() -> None:
    assert {p for p in PACKAGES if of_package(p)} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package: str) -> None:
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for path in of_package(package)
        for module, line in imports(path)
        if module.startswith("quire.")
        and (sibling := module.split(".")[1]) in PACKAGES
        and sibling not in MAY_IMPORT[package]
        and not module.startswith(CONTRACTS)
        and (name(path), sibling) not in EXCEPTIONS
    ]
    assert not wrong


def test_our_packages_are_never_imported_bare() -> None:
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for path in SOURCES
        for module, line in imports(path)
        if top(module) in PACKAGES or top(module) == "tests"
    ]
    assert not wrong


def test_inside_the_package_imports_are_relative() -> None:
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            absolute = isinstance(node, ast.ImportFrom) and node.level == 0 and top(node.module or "") == "quire"
            assert not absolute, f"{name(path)}:{node.lineno}"  # type: ignore[attr-defined]


def test_the_scheduler_needs_only_the_standard_library() -> None:
    for path in of_package("scheduler"):
        for module, line in imports(path):
            assert top(module) == "quire" or top(module) in sys.stdlib_module_names, f"{name(path)}:{line} {module}"


def test_kernels_need_only_torch_numpy_and_triton() -> None:
    allowed = KERNEL_LIBRARIES | set(sys.stdlib_module_names) | {"quire"}
    for path in of_package("kernels"):
        for module, line in imports(path):
            assert top(module) in allowed, f"{name(path)}:{line} {module}"


@pytest.mark.parametrize("package", ["engine", "kernels"])
def test_no_web_or_wire_library_is_needed_to_run_an_engine(package: str) -> None:
    for path in of_package(package):
        if name(path) in WIRE_FILES:
            continue
        for module, line in imports(path, anywhere=False):
            assert top(module) not in SERVER_LIBRARIES, f"{name(path)}:{line} {module}"


def test_the_engine_knows_no_asyncio() -> None:
    for package in ("engine", "scheduler", "kernels"):
        for path in of_package(package):
            assert "asyncio" not in {top(module) for module, _ in imports(path)}, name(path)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def violations(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (f"{node.lineno}: import {a.name}" for a in names if top(a.name) in FORBIDDEN_MODULES)
            case ast.ImportFrom(module=str(module)) if top(module) in FORBIDDEN_MODULES:
                yield f"{node.lineno}: from {module}"
            case ast.Name(id=called) if called in FORBIDDEN_NAMES:
                yield f"{node.lineno}: {called}"
            case ast.Attribute() if _dotted(node) in FORBIDDEN_CALLS or node.attr in ("send_pyobj", "recv_pyobj"):
                yield f"{node.lineno}: {_dotted(node)}"
            case ast.keyword(arg="shell" | "trust_remote_code", value=ast.Constant(value=True)):
                yield f"{node.lineno}: {node.arg}=True"


# The recipe of the bundled model resumes from checkpoints that it wrote itself; nothing that serves imports it.
OWN_CHECKPOINTS = {"models/train.py", "models/export.py"}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_code_is_made_from_data(path: Path) -> None:
    found = list(violations(parse(path)))
    if name(path) in OWN_CHECKPOINTS:
        found = [text for text in found if not text.endswith("torch.load")]
    assert not found


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "run = exec",
        "torch.load(f)",
        "yaml.load(f)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "socket.recv_pyobj()",
    ],
)
def test_planted_dangers_are_found(planted: str) -> None:
    assert list(violations(ast.parse(planted)))


def tracked_texts() -> list[Path]:
    """Files of the project: what git knows or would add; without git, what lies in the folders of the package."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = [ROOT / line for line in listed.stdout.splitlines()] if listed.returncode == 0 else SOURCES
    return [p for p in files if p.suffix in TEXT_SUFFIXES and p.is_file() and p != Path(__file__).resolve()]


def test_nothing_names_a_machine_or_where_packages_come_from() -> None:
    found = [
        f"{name(path)}:{number} {line.strip()[:100]}"
        for path in tracked_texts()
        if path.stat().st_size < 1 << 20
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found


def test_the_machine_pattern_matches_what_it_is_for() -> None:
    # In pieces, so that this file passes the test above.
    hosts = [
        f"{name}.org" for name in ("https://pypi", "files.python" + "hosted", "download.pytorch", "conda.anaconda")
    ]
    for bad in ("see /work/box/x", "/home/ann/quire", "/Users/ann/quire", "/opt/pypi/simple", *hosts):
        assert MACHINE.search(bad), bad
    for fine in ("the work/home split", "https://example.org/work", "pip install quire", "framework/home/"):
        assert not MACHINE.search(fine), fine


def test_every_package_is_in_the_wheel() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in SOURCES if path.name == "__init__.py"}
    assert listed == {".".join(("quire", *folder.relative_to(ROOT).parts)) for folder in folders}
