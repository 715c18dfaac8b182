"""What cannot be, asked of a real `quire serve`: one line that names it, exit code 2, and nothing left running."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def refusal(tmp_path: Path, *args: str, **env: str) -> str:
    """The one line that such a server ends with."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "quire.server.cli", "serve", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary), **env},
        start_new_session=True,
    )
    said, _ = server.communicate(timeout=240)
    assert server.returncode == 2, said
    assert list(temporary.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(server.pid, 0)  # its session: whatever it has started
    echoes = ("(command line)", "(environment)", "(config file)")  # of what was set
    lines = [line for line in said.splitlines() if not line.endswith(echoes)]
    assert len(lines) == 1, said
    return lines[0]


@pytest.mark.parametrize("option", ["--port", "--health-port"])
def test_a_port_in_use(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(tmp_path, *(["--port", "0"] if option == "--health-port" else []), option, str(port))
    assert line.startswith(f"quire: {option} {port}: nothing can listen there on 127.0.0.1 (Address already in use)")


def test_a_host_that_is_none_of_ours(tmp_path: Path) -> None:
    line = refusal(tmp_path, "--host", "192.0.2.1", "--port", "0", "--insecure-no-auth")
    assert "on 192.0.2.1 (Cannot assign requested address)" in line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    line = refusal(tmp_path, "--config", str(tmp_path / "none.yaml"))
    assert line.endswith("none.yaml cannot be read: No such file or directory")
    assert "--config" in line


def test_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "quire.yaml").write_text("port: 0\nmax-seqs: 3\n")
    line = refusal(tmp_path, QUIRE_CONFIG=str(tmp_path / "quire.yaml"))
    assert "unknown max-seqs; did you mean max-num-seqs?" in line


def test_an_unknown_variable(tmp_path: Path) -> None:
    line = refusal(tmp_path, QUIRE_MAX_MODEL_LENGTH="64")
    assert "QUIRE_MAX_MODEL_LENGTH" in line
    assert "did you mean max-model-len?" in line


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ("--dtype int3", ("dtype", "int3", "bfloat16")),
        ("--device tpu", ("device", "tpu", "cuda")),
        ("--max-model-len 100 --num-blocks 2", ("max_model_len", "100", "kv_cache_bytes")),
        ("--kernels attention=fast", ("attention", "fast", "reference")),
        ("--scheduling-policy lottery", ("scheduling_policy", "lottery", "fcfs")),
        ("--tensor-parallel-size 3", ("tensor_parallel_size", "3")),
        ("--quantization int5", ("quantization", "int5", "int4")),
    ],
)
def test_what_the_engine_cannot_be(tmp_path: Path, tiny_model: Path, args: str, names: tuple[str, ...]) -> None:
    """The engine itself finds out, in its process, before it loads anything."""
    line = refusal(tmp_path, str(tiny_model), "--port", "0", *args.split())
    for name in names:
        assert name in line


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no model folder nowhere;" in refusal(tmp_path, "./nowhere", "--port", "0")
