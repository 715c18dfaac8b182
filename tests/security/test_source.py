"""Habits that became advisories elsewhere, looked for in the source: beside what `test_house.py` forbids."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path
    for package in ("server", "engine", "scheduler", "kernels", "bench", "models")
    for path in (ROOT / package).rglob("*.py")
)
# Where data of requests and of model folders passes: an `assert` there vanishes under -O.
OF_REQUESTS = [path for path in SHIPPED if path.relative_to(ROOT).parts[0] in ("server", "engine")]
OWN_STATE = re.compile(r"self\.[\w.]+ is not None")  # what nobody outside chooses
SECRET = re.compile(r"(?:^|[_.])(?:api_key|secret|digest|password|authorization|offered)s?$", re.IGNORECASE)
KEY = re.compile(r"(?:^|[_.])(?:key|token)s?$")  # in the files of keys; elsewhere these are of dictionaries and models
OF_KEYS = ("server/auth.py", "server/keys.py", "server/keys_file.py", "server/attempts.py", "server/quotas.py")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(node: ast.AST) -> str:
    return ast.unparse(node)


def dangers(tree: ast.AST) -> Iterator[str]:
    """Environments of templates that are no sandbox, temporary names that can be taken, commands for a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if (
                called.split(".")[-1] in ("Environment", "SandboxedEnvironment", "NativeEnvironment")
                and "jinja2" in called
            ):
                yield f"{node.lineno}: {called}"
            if called in ("jinja2.Template", "tempfile.mktemp", "os.tmpnam", "getattr(__builtins__"):
                yield f"{node.lineno}: {called}"
            if called in ("importlib.import_module", "import_module", "__import__") and not all(
                isinstance(arg, ast.Constant) for arg in node.args[:1]
            ):
                yield f"{node.lineno}: {called} of a value"
            if called in ("yaml.load", "logging.config.listen", "ctypes.pythonapi", "subprocess.getoutput"):
                yield f"{node.lineno}: {called}"
        if isinstance(node, ast.ClassDef):
            for base in map(dotted, node.bases):
                if base.split(".")[-1].endswith("Environment") and not base.endswith("ImmutableSandboxedEnvironment"):
                    yield f"{node.lineno}: class of {base}"


def compared_secrets(tree: ast.AST, pattern: re.Pattern[str] = SECRET) -> Iterator[str]:
    """`==` and `!=` on a name that says it is a secret: how long that takes tells how much was right."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Name | ast.Attribute) and pattern.search(dotted(side)) for side in sides):
                yield f"{node.lineno}: {dotted(node)}"


def asserts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and not OWN_STATE.fullmatch(dotted(node.test)):
            yield f"{node.lineno}: {dotted(node.test)}"


@pytest.mark.advisory("CVE-2026-5760", "CVE-2026-41523", "CVE-2025-9141", "CVE-2024-3924", "CVE-2026-15971")
@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_no_dangerous_habit(path: Path) -> None:
    found = list(dangers(ast.parse(path.read_text(encoding="utf-8"))))
    if path not in OF_REQUESTS:  # kernels and benchmarks import modules of ours by names of ours
        found = [text for text in found if not text.endswith("of a value")]
    assert not found


@pytest.mark.advisory("CVE-2025-59425")
def test_secrets_are_compared_in_constant_time() -> None:
    found = {
        name(path): texts
        for path in OF_REQUESTS
        for pattern in ((SECRET, KEY) if name(path) in OF_KEYS else (SECRET,))
        if (texts := list(compared_secrets(ast.parse(path.read_text(encoding="utf-8")), pattern)))
    }
    assert not found


@pytest.mark.advisory("CVE-2026-41523", "PYSEC-2026-2303")
def test_no_assertion_guards_a_request() -> None:
    found = {
        name(path): texts
        for path in OF_REQUESTS
        if (texts := list(asserts(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert not found


def test_every_refusal_is_in_the_catalogue() -> None:
    """Nobody but `errors.py` makes an ApiError, and no code there is used for two statuses that mean different acts."""
    made = {
        name(path): node.lineno
        for path in OF_REQUESTS
        if name(path) != "server/errors.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "ApiError"
    }
    assert not made
    codes: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse((ROOT / "server" / "errors.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and dotted(node.func) == "ApiError":
            code = next((word.value for word in node.keywords if word.arg == "code"), None)
            if isinstance(code, ast.Constant):
                codes.setdefault(code.value, set()).add(dotted(node.args[0]))
    assert len(codes) > 15
    assert {code: statuses for code, statuses in codes.items() if len(statuses) > 1} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "jinja2.Environment()",
        "jinja2.sandbox.SandboxedEnvironment()",
        "class E(jinja2.sandbox.SandboxedEnvironment): pass",
        "jinja2.Template(text)",
        "tempfile.mktemp()",
        "importlib.import_module(config['auto_map'])",
        "__import__(name)",
        "yaml.load(text)",
    ],
)
def test_planted_habits_are_found(planted: str) -> None:
    assert list(dangers(ast.parse(planted)))


def test_planted_comparisons_and_assertions_are_found() -> None:
    for planted in ("if offered == digest: pass", "x = self._secret != given", "api_key == 'x'"):
        assert list(compared_secrets(ast.parse(planted))), planted
    assert list(asserts(ast.parse("assert 0 <= token_id < vocab_size")))


@pytest.mark.advisory("CVE-2026-41523", "PYSEC-2026-2303")
def test_checks_hold_without_assertions() -> None:
    """The refusals of requests and of folders, in an interpreter that drops every `assert`."""
    script = """
import sys
assert False, "assertions are off"
from quire.engine.errors import RequestError
from quire.engine.messages import AddRequest
from quire.engine.validation import Limits, check_request
from quire.engine.template import Template
from quire.scheduler.params import SamplingParams
refused = 0
limits = Limits(vocab_size=300, max_model_len=64)
cases = [
    ([300], {}), ([-1], {}), ([], {}), ([1] * 99, {}), ([1], {"n": 10**9}), ([1], {"temperature": float("nan")}),
    ([1], {"logit_bias": {300: 1.0}}), ([1], {"stop_token_ids": (300,)}), ([1], {"min_tokens": 5}),
    ([1], {"top_p": 0.0}),
    ([1], {"allowed_token_ids": ()}),
    ([1], {"bad_words": ((300,),)}), ([1], {"logprobs": 999}), ([1], {"seed": 2**64}),
]
for prompt, fields in cases:
    try:
        check_request(AddRequest("x", prompt, SamplingParams(**{"max_tokens": 2, **fields})), limits)
    except RequestError:
        refused += 1
for source in ("{{ ''.__class__ }}x{{ ''.__class__.__mro__[1] }}", "{{ 'x' * 10**10 }}", "{% include 'x' %}"):
    try:
        Template(source).render({})
    except Exception:
        refused += 1
print(refused, len(cases) + 3)
"""
    ran = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    refused, cases = ran.stdout.split()
    assert refused == cases
