"""Templates in workers: the same text as in this process, and a worker that goes wrong takes one render with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

from quire.engine import rendering
from quire.engine.rendering import Workers
from quire.engine.template import Complaint, Template

# A worker whose templates do, by their name, what the sandbox lets none do.
ESCAPED = """
import os, sys, time
from quire.engine import rendering
from quire.engine.template import Template

def render(self, variables):
    what = self.source
    if what == "busy":
        while True:
            sum(range(1000))
    if what == "stuck":
        time.sleep(1000)
    if what == "exits":
        os._exit(3)
    if what == "hungry":
        return str(len(bytearray(3 << 30)))
    if what == "writes":
        with open(variables["path"], "w") as file:
            file.write("written")
            file.flush()
    if what == "forks":
        os.posix_spawn("/bin/true", ["true"], {})
    if what == "opens many":
        kept = [open("/dev/null") for _ in range(100)]
    if what == "environment":
        return " ".join(os.environ)
    if what == "babbles":
        os.write(0, b"\\5\\0\\0\\0hello")
    if what == "floods":
        os.write(0, b"\\xff\\xff\\xff\\xff")
    return what

Template.render = render
rendering.main()
"""


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


@pytest.fixture
def escaped(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> Workers:
    monkeypatch.setattr(rendering, "COMMAND", (sys.executable, "-c", ESCAPED))
    return workers


def pids(workers: Workers) -> list[int]:
    return [worker._process.pid for worker in workers._idle.queue]


def test_the_text_is_the_one_of_this_process(workers: Workers) -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}{{ n }}|{{ x }}|{{ y }}"
    variables = {"messages": [{"role": "user", "content": "é 🙂 \x00 \u2028"}], "n": 10**30, "x": 0.1, "y": None}
    remote, local = workers.compile(source), Template(source)
    assert remote.variables == local.variables == {"messages", "n", "x", "y"}
    assert remote.render(variables) == local.render(variables)


def test_one_worker_serves_whoever_asks_in_turn(workers: Workers) -> None:
    templates = [workers.compile(f"{i} {{{{ x }}}}") for i in range(40)]
    for _ in range(2):
        assert [template.render({"x": "y"}) for template in templates] == [f"{i} y" for i in range(40)]
    assert len(pids(workers)) == 1


def test_many_threads_at_once(workers: Workers) -> None:
    template = workers.compile("{{ x }}" * 100)
    wrong: list[int] = []

    def render(i: int) -> None:
        for _ in range(20):
            if template.render({"x": str(i)}) != str(i) * 100:
                wrong.append(i)

    threads = [threading.Thread(target=render, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= len(pids(workers)) <= 6


def test_a_fault_and_a_complaint_stay_what_they_are(workers: Workers) -> None:
    with pytest.raises(TemplateError, match="xpected"):
        workers.compile("{% for %}")
    with pytest.raises(Complaint, match="turns must alternate"):
        workers.compile("{{ raise_exception('turns must alternate') }}").render({})
    with pytest.raises(TemplateError) as caught:
        workers.compile("{{ 'x' * 10**10 }}").render({})
    assert not isinstance(caught.value, Complaint)
    assert len(pids(workers)) == 1  # the sandbox itself refused: no worker had to end


def test_an_endless_loop_is_ended_by_the_sandbox_and_the_worker_stays(workers: Workers) -> None:
    template = workers.compile("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    (before,) = pids(workers)
    with pytest.raises(TemplateError, match="runs for more than"):
        template.render({})
    assert pids(workers) == [before]


def test_what_the_sandbox_cannot_end_is_killed_and_replaced(escaped: Workers) -> None:
    busy, fine = escaped.compile("busy"), escaped.compile("fine")
    (before,) = pids(escaped)
    others: list[str] = []
    thread = threading.Thread(target=lambda: others.extend(fine.render({}) for _ in range(20)))
    begun = threading.Event()

    def spend() -> None:
        begun.set()
        with pytest.raises(TemplateError, match="the template runs for more than 1 s"):
            busy.render({})

    spender = threading.Thread(target=spend)
    spender.start()
    begun.wait()
    thread.start()
    thread.join()
    assert others == ["fine"] * 20
    spender.join()
    assert fine.render({}) == "fine"
    assert before not in pids(escaped) or len(pids(escaped)) == 2
    for source in ("exits", "busy"):
        with pytest.raises(TemplateError):
            escaped.compile(source).render({})
        assert fine.render({}) == "fine"


def test_a_worker_that_stands_still_is_given_up(escaped: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = escaped.compile("stuck")
    monkeypatch.setattr(rendering, "WALL_SECONDS", 0.2)
    with pytest.raises(TemplateError, match="no answer"):
        stuck.render({})
    monkeypatch.undo()
    assert Workers().compile("{{ 1 }}").render({}) == "1"


def test_a_worker_that_somebody_killed_is_not_noticed(workers: Workers) -> None:
    template = workers.compile("{{ x }}")
    for _ in range(3):
        os.kill(pids(workers)[0], signal.SIGKILL)
        assert template.render({"x": "still"}) == "still"


@pytest.mark.parametrize("source", ["exits", "hungry", "forks", "opens many", "babbles", "floods"])
def test_what_gets_out_of_the_sandbox_gets_nowhere(escaped: Workers, source: str) -> None:
    if source == "forks" and os.getuid() == 0:
        pytest.skip("the kernel does not count the processes of root")
    with pytest.raises(TemplateError):
        escaped.compile(source).render({})
    assert escaped.compile("fine").render({}) == "fine"


def test_no_file_can_be_written(escaped: Workers, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(TemplateError):  # the file can be made, but holds no byte
        escaped.compile("writes").render({"path": str(path)})
    assert not path.exists() or path.read_text() == ""


def test_the_environment_stays_outside(escaped: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "canary")
    monkeypatch.setenv("HF_TOKEN", "canary")
    names = escaped.compile("environment").render({}).split()
    assert set(names) <= {*rendering.ENVIRONMENT, "LC_CTYPE"}


def test_workers_end_with_the_process_that_asks() -> None:
    script = (
        "import time\nfrom quire.engine.rendering import Workers\n"
        "workers = Workers(); workers.warm(2)\n"
        "print(*(worker._process.pid for worker in workers._idle.queue), flush=True)\ntime.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while any(_runs(pid) for pid in children):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
