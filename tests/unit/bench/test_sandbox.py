from __future__ import annotations

import time
from pathlib import Path

import pytest

from quire.bench.sandbox import CHILD, passes
from quire.bench.tasks import Task, example_tasks, parse_tasks

EXAMPLES = ">>> f(2)\n4"


def judged(body: str, examples: str = EXAMPLES) -> bool:
    return passes(f"import os, socket, subprocess, sys\ndef f(x):\n    {body}\n", "candidate", examples)


def test_right_and_wrong_answers() -> None:
    assert judged("return x * x")
    assert not judged("return x * 3")
    assert not judged("return 1 / 0")
    assert not judged("return x * x", examples="no examples in here")
    assert not passes("def f(x:\n", "candidate", EXAMPLES)


@pytest.mark.parametrize(
    "escape",
    [
        "open('made', 'w')",
        "os.open('made', os.O_CREAT | os.O_RDWR)",
        "os.mkdir('made')",
        "os.remove(__file__)",
        "os.fork()",
        "os.kill(os.getppid(), 0)",
        "subprocess.run(['true'])",
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.socket()",
        "__import__('ctypes').CDLL(None)",
        "__import__('resource').setrlimit(0, (9, 9))",
        "bytearray(1 << 32)",
    ],
)
def test_what_leaves_the_fence_is_refused(escape: str) -> None:
    """The same body without the attempt passes, so it is the attempt that fails."""
    assert judged("pass\n    return x * x")
    assert not judged(f"{escape}\n    return x * x")


def test_the_verdict_cannot_be_forged_by_leaving_or_printing() -> None:
    assert not judged("sys.exit(0)")
    assert not judged("os._exit(0)")
    assert not judged("print('4'); sys.stdout.flush(); os._exit(0)")
    assert not judged("print(sys.argv, file=sys.__stdout__)\n    return 5")


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(60)"])
def test_what_does_not_end_is_ended(body: str) -> None:
    started = time.monotonic()
    assert not judged(body)
    assert time.monotonic() - started < 30


def test_the_child_knows_neither_site_packages_nor_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "secret")
    assert passes("import os, sys\n", "candidate", ">>> 'QUIRE_API_KEY' in os.environ\nFalse")
    assert passes("import os, sys\n", "candidate", ">>> any('site-packages' in p for p in sys.path)\nFalse")
    assert CHILD.is_file()


# tasks


def task(prompt: str = "def f(x):\n    ", indent: int = 0) -> Task:
    return Task("f", "candidate", prompt, "", indent, "return x * x", EXAMPLES)


def test_a_body_ends_where_the_next_thing_begins() -> None:
    assert task().body("return 1\n\ndef g():\n    pass") == "return 1"
    assert task().body("if x:\n        return 1\n\n    return 2\nx = 3") == "if x:\n        return 1\n\n    return 2"
    method = task("class C:\n    def f(x):\n        ", indent=4)
    assert method.body("return 1\n    def g(self):") == "return 1"


def test_only_a_function_that_does_something_parses() -> None:
    for good in ("return 1", "if x:\n        return 1\n    return 2", "pass"):
        assert task().parses(good)
    for bad in ("", "'''text'''", "return (1", "return 1\nx = 2", "\x00", "if x:"):
        assert not task().parses(bad)
    assert task("def f(x): ").parses("return 1")
    assert task("class C:\n    def f(x):\n        ", indent=4).parses("return 1")


def test_every_reference_parses_and_none_is_empty() -> None:
    tasks = parse_tasks(40, seed=1)
    assert tasks == parse_tasks(40, seed=1) != parse_tasks(40, seed=2)
    assert all(t.parses(t.reference) and t.body(t.reference) == t.reference for t in tasks)


def test_the_librarys_own_bodies_pass_their_examples_and_an_empty_one_does_not() -> None:
    tasks = example_tasks()
    assert len(tasks) >= 20
    for t in tasks:
        assert t.passes(t.reference), t.name
        assert not t.passes("return None"), t.name


def test_the_tasks_are_held_out() -> None:
    from quire.models.corpus import split_library

    seen = {module.path for part in (split_library().library, split_library().tests) for module in part}
    assert not {t.module.replace(".", "/") + ".py" for t in example_tasks()} & seen
    assert Path(CHILD).name == "sandbox_child.py"
