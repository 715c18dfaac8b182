"""Bars of what takes long: drawn on a terminal, and not a byte of them anywhere else."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ESCAPE = "\x1b["
QUIRE = [sys.executable, "-P", "-m", "quire.server.cli"]
COUNT = """
from quire.server.cli_progress import bar
import time
with bar("parts") as shown:
    for done in range(5):
        shown.show(done, 4, "and more")
        time.sleep(0.2)
"""


class Screen:
    """A terminal whose other side is a process's stderr; everything that was ever written to it."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._ours, 65536):
                self.text += data.decode(errors="replace")
        except OSError:
            pass  # the other side has closed

    def close(self) -> None:
        os.close(self.theirs)
        self._reader.join(30)
        os.close(self._ours)


def terminal(**more: str) -> dict[str, str]:
    return {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **more}


def on_a_screen(*command: str) -> str:
    screen = Screen()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=screen.theirs, timeout=240, env=terminal())
    screen.close()
    assert done.returncode == 0, screen.text
    return screen.text


def into_a_file(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=240, env=terminal())
    assert done.returncode == 0, done.stderr
    return done.stderr.decode()


def test_a_bar_counts_and_goes_away() -> None:
    text = on_a_screen(sys.executable, "-P", "-c", COUNT)
    assert "parts" in text
    assert "4/4" in text
    assert "and more" in text
    assert text.rstrip("\r\n").endswith("\x1b[2K"), "the last line is wiped"


def test_nothing_moves_where_there_is_no_terminal() -> None:
    assert into_a_file(sys.executable, "-P", "-c", COUNT) == ""


@pytest.fixture
def quantizable(tiny_model: Path, tmp_path: Path) -> list[str]:
    from conftest import make_tiny_model, write_byte_tokenizer

    model = make_tiny_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    write_byte_tokenizer(model)
    (tmp_path / "text.txt").write_text("def largest(a, b):\n    return a if a > b else b\n" * 20)
    return ["quantize", str(model), "--text", str(tmp_path / "text.txt"), "--group", "32", "--tokens", "256"]


def test_quantizing(quantizable: list[str], tmp_path: Path) -> None:
    assert "calibrating on" in on_a_screen(*QUIRE, *quantizable, "--out", str(tmp_path / "a"))
    assert ESCAPE not in into_a_file(*QUIRE, *quantizable, "--out", str(tmp_path / "b"))


def test_a_window_that_the_model_cannot_read_is_refused(quantizable: list[str], tmp_path: Path) -> None:
    command = [*QUIRE, *quantizable, "--out", str(tmp_path / "a"), "--window", "600"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "--window: 600: the model's context is 512, give at most that" in done.stderr
    assert done.stderr.count("\n") == 1


def serve(model: Path, stderr: int, log: Path) -> subprocess.Popen[bytes]:
    options = ["--port", "0", "--dtype", "float32", "--threads", "1"]
    with log.open("wb") as out:
        return subprocess.Popen([*QUIRE, "serve", str(model), *options], stdout=out, stderr=stderr, env=terminal())


def stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0


def test_a_start_is_drawn_until_it_is_over(tiny_model: Path, tmp_path: Path) -> None:
    screen = Screen()
    server = serve(tiny_model, screen.theirs, tmp_path / "out")
    end = time.monotonic() + 120
    while "ready in" not in screen.text:
        assert time.monotonic() < end, screen.text
        assert server.poll() is None, screen.text
        time.sleep(0.05)
    stop(server)
    screen.close()
    assert any(phase in screen.text for phase in ("load weights", "allocate KV cache", "warm up", "time steps"))
    assert "\x1b[?25l" in screen.text, "the cursor is hidden while a bar is drawn"
    assert screen.text.rfind("\x1b[?25h") > screen.text.rfind("\x1b[?25l"), "and is there again"
    (line,) = (line for line in screen.text.splitlines() if "ready in" in line)
    assert "server: model" in line, "lines of the log stay whole"


def test_a_start_without_a_terminal_is_lines_alone(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "err"
    with log.open("wb") as err:
        server = serve(tiny_model, err.fileno(), tmp_path / "out")
    end = time.monotonic() + 120
    while "ready in" not in log.read_text():
        assert time.monotonic() < end
        assert server.poll() is None, log.read_text()
        time.sleep(0.05)
    stop(server)
    assert ESCAPE not in log.read_text()
    assert "━" not in log.read_text()


def llm(model: Path, **settings: object) -> list[str]:
    given = {"dtype": "float32", "threads": 1, **settings}
    return [sys.executable, "-P", "-c", f"import quire\nwith quire.LLM({str(model)!r}, **{given}): pass"]


def test_an_engine_without_a_server_is_drawn_too(tiny_model: Path) -> None:
    text = on_a_screen(*llm(tiny_model))
    assert "load weights" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor is there again"
    assert ESCAPE not in on_a_screen(*llm(tiny_model, progress=False))
    assert into_a_file(*llm(tiny_model)) == ""
