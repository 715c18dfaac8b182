"""Kernels compiled ahead of time: the machinery, the record, and a sample of the kernels for an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from quire.kernels import TRITON, aot
from quire.kernels.aot import Usage, blocks_per_sm, parse_resources, problems
from quire.kernels.triton.specialization import ARCHES, Specialization

FINE = Usage(registers=128, stack=0, shared=64 * 1024, mma="wgmma", wide=8, blocks=3)
KERNEL = SimpleNamespace(arg_names=["x", "n", "BLOCK"], __name__="kernel")
LISTED = Specialization("one", KERNEL, {"x": "*bf16:16", "n": "i32"}, {"BLOCK": 64})

TOY = """
import triton, triton.language as tl
from quire.kernels import aot
from quire.kernels.triton.specialization import Specialization

@triton.jit
def product(a, b, c, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i[:, None] * n + i[None, :])
    y = tl.load(b + i[:, None] * n + i[None, :])
    tl.store(c + i[:, None] * n + i[None, :], tl.dot(x, y).to(tl.bfloat16))

@triton.jit
def broken(a, BLOCK: tl.constexpr):
    tl.store(a + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))

@triton.jit
def sums(a, b, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(n):
        acc += tl.load(a + j * ROWS + r)[:, None] * tl.load(a + j * COLUMNS + c)[None, :]
    tl.store(b + r[:, None] * COLUMNS + c[None, :], acc)

pointers = {name: "*bf16:16" for name in "abc"}
good = Specialization("good", product, pointers | {"n": "i32:16"}, {"BLOCK": 64})
usage = aot.compile_for(good, 90)
assert usage.mma == "wgmma", usage
assert usage.wide > 0 and usage.stack == 0 and 0 < usage.registers < 256 and usage.blocks > 0, usage
assert list(aot.problems(90, usage, ("mma", "wide"), None)) == []
unaligned = Specialization("u", product, dict.fromkeys("abc", "*bf16") | {"n": "i32"}, {"BLOCK": 64})
assert aot.compile_for(unaligned, 90).wide == 0
# 128 x 64 sums on 32 threads are 256 registers of each, and there are 255.
spilling = Specialization("s", sums, {"a": "*fp32:16", "b": "*fp32:16", "n": "i32"}, {"ROWS": 128, "COLUMNS": 64}, 1)
assert aot.compile_for(spilling, 80).stack > 0
try:
    aot.compile_for(Specialization("b", broken, {"a": "*i32:16"}, {"BLOCK": 64}), 90)
except Exception as error:
    print("refused:", type(error).__name__)
else:
    raise SystemExit("a broken kernel was compiled")
"""


def compiler(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process whose Triton compiles, with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )


# --- the kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRITON)
def test_every_module_lists_what_it_launches(name: str) -> None:
    listed = aot.specializations_of(name)
    for specialization in listed.values():
        assert aot.source(specialization).name
        assert set(specialization.arches) <= set(ARCHES)


def test_a_sample_compiles_for_an_h100(tmp_path: Path) -> None:
    done = compiler(tmp_path, "-m", "quire.kernels.aot", "--sample", "--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 refused" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_everything_compiles_and_takes_no_more_than_recorded(tmp_path: Path, arch: int) -> None:
    done = compiler(tmp_path, "-m", "quire.kernels.aot", "--arch", str(arch))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_record_is_of_the_kernels_that_are_listed() -> None:
    recorded = aot.load_record().get(aot.triton_series())
    if recorded is None:
        pytest.skip(f"nothing is recorded for Triton {aot.triton_series()}")
    listed = {key: {str(arch) for arch in value.arches} for key, value in aot.catalogue().items()}
    assert {key: set(arches) for key, arches in recorded.items()} == listed, "run python -m quire.kernels.aot --record"
    for arches in recorded.values():
        for arch, usage in arches.items():
            assert int(usage["shared"]) <= aot.SHARED_LIMIT[int(arch)]


# --- the machinery ---------------------------------------------------------------------------------------------------


def test_a_good_a_spilling_and_a_broken_kernel(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    done = compiler(tmp_path, "toy.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused: CompilationError" in done.stdout


def test_it_will_not_compile_what_is_interpreted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert "unset it" in capsys.readouterr().err


def test_problems() -> None:
    assert list(problems(90, FINE, ("mma", "wide"), {"stack": 0})) == []
    assert "shared memory" in next(problems(90, replace(FINE, shared=228 * 1024), (), None))
    assert "tensor-core" in next(problems(90, replace(FINE, mma=""), ("mma",), None))
    assert "128-bit" in next(problems(90, replace(FINE, wide=0), ("wide",), None))
    assert "no block" in next(problems(90, replace(FINE, blocks=0), (), None))
    assert "new spills" in next(problems(90, replace(FINE, stack=16), (), {"stack": 8}))
    assert list(problems(90, replace(FINE, stack=16), (), {"stack": 16})) == []
    assert list(problems(90, replace(FINE, stack=16), (), None)) == []


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        (90, 32, 0, 4, 16),  # 64 warps of 1,024 registers
        (90, 255, 0, 8, 1),  # 8 warps of 8,192 registers: the 64 Ki of them, once
        (90, 40, 0, 4, 12),  # 65,536 / (4 · 1,280)
        (90, 33, 0, 4, 12),  # registers come in pieces: as 40
        (90, 64, 113 * 1024, 4, 2),  # 228 KiB, 1 KiB of each block is the system's
        (80, 64, 113 * 1024, 4, 1),
        (90, 16, 0, 1, 32),  # the most blocks there are
    ],
)
def test_blocks_per_multiprocessor(arch: int, registers: int, shared: int, warps: int, blocks: int) -> None:
    assert blocks_per_sm(arch, registers, shared, warps) == blocks


def test_resources_are_read_from_cuobjdump() -> None:
    text = " Function f:\n  REG:40 STACK:24 SHARED:0 LOCAL:8 CONSTANT[0]:600\n"
    text += " Function g:\n  REG:12 STACK:0 SHARED:0 LOCAL:0"
    assert parse_resources(text) == (40, 32)
    with pytest.raises(ValueError, match="no resource usage"):
        parse_resources("cuobjdump fatal: no such file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signature": {"x": "*bf16"}}, "missing ['n']"),
        ({"constexprs": {"BLOCK": 64, "TILE": 1}}, "unknown ['TILE']"),
        ({"constexprs": {"BLOCK": 64, "n": 1}}, "twice ['n']"),
        ({"signature": {"x": "*bf16:8", "n": "i32"}}, "hint '8'"),
    ],
)
def test_a_wrong_signature_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="one: ") as caught:
        aot.source(replace(LISTED, **changes))
    assert message in str(caught.value)


def test_divisibility_reaches_the_compiler() -> None:
    source = aot.source(LISTED)
    assert source.signature == {"x": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    assert source.attrs == {(0,): [["tt.divisibility", 16]]}
    assert source.constants == {(2,): 64}


def test_recording_keeps_other_series_and_drops_what_is_gone(tmp_path: Path) -> None:
    path, series = tmp_path / "record.json", aot.triton_series()
    aot.write_record(["a/1", "a/2"], {"a/1": {"80": {"stack": 0}}, "a/2": {"80": {"stack": 1}}}, path)
    aot.write_record(["a/1"], {"a/1": {"90": {"stack": 2}}}, path)
    assert aot.load_record(path) == {series: {"a/1": {"80": {"stack": 0}, "90": {"stack": 2}}}}


def test_the_first_of_each_module() -> None:
    assert aot.first_of_each_module(["a/1", "a/2", "b/1", "a/3"]) == ["a/1", "b/1"]
