"""`quire bench kernels`: work for every op, figures that add up, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from quire.bench import kernel_work, kernels
from quire.bench.kernel_work import WORK, Shape, Subject, Work, formats
from quire.bench.kernels import Ceilings, KernelsConfig, burst, chosen, medians, served
from quire.kernels import implementations, ops
from quire.kernels.cpu.native import library
from quire.server import cli

SMALL = Shape(hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=32, vocab=160, experts=4, top_k=2, expert_ffn=32)
KEYS = {"op", "format", "rows", "ms", "gb_s", "tflop_s", "fraction_of_limit", "aten_ms"}
needs_library = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy of each weight, small layers, short measurements."""
    monkeypatch.setattr(kernel_work, "BEYOND_CACHE", 0)
    monkeypatch.setattr(kernels, "BEYOND_CACHE", 1 << 20)
    monkeypatch.setattr(kernels, "CUBE", 64)
    monkeypatch.setattr(kernels, "BUDGET", 0.0)
    monkeypatch.setattr(kernels, "BURST", 0.0)
    monkeypatch.setattr(kernels, "shape_of", lambda model: SMALL)


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", "kernels", *args], env={"COLUMNS": "200", "TERM": "dumb"})


@needs_library
def test_every_compiled_kernel_has_work() -> None:
    assert {op for op in ops() if "native" in implementations(op)} <= WORK.keys()


@pytest.mark.parametrize("op", sorted(WORK.keys() & set(ops())))
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.usefixtures("little")
def test_the_work_can_be_done(op: str, rows: int) -> None:
    """By the reference, which serves everything, and by torch's operators."""
    for format in formats(op):
        work = WORK[op](Subject(implementations(op)["reference"], format, SMALL))(rows)
        assert work.nbytes > 0
        for call in (*work.calls, *work.aten):
            call()


@pytest.mark.parametrize("op", ["linear", "linear_int8", "linear_int4", "linear_w8a8", "attention", "silu_and_mul"])
@pytest.mark.usefixtures("little")
def test_torch_computes_the_same(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a linear the last of the four products."""
    monkeypatch.setattr(kernel_work, "after", lambda *functions: functions[-1])
    subject = Subject(implementations(op)["reference"], formats(op)[0] if op != "attention" else "bf16", SMALL)
    for rows in (3, 70):
        work = WORK[op](subject)(rows)
        ours, aten = work.calls[0](), work.aten[0]()
        if op == "attention":
            assert isinstance(aten, torch.Tensor)
            ours, aten = ours[0], aten.transpose(1, 2).flatten(0, 1)  # type: ignore[index]
        torch.testing.assert_close(aten, ours, rtol=5e-2, atol=5e-2)


@pytest.mark.usefixtures("little")
def test_bytes_and_operations_of_a_product() -> None:
    subject = Subject(implementations("linear")["reference"], "bf16", SMALL)
    work = kernel_work.layer_products(subject)
    shapes = [(256, 64), (64, 128), (192, 64), (64, 96)]
    assert SMALL.matrices == tuple(shapes)
    assert work(5).operations == sum(2 * 5 * n * k for n, k in shapes)
    assert work(5).nbytes == sum(2 * (n * k + 5 * n + 5 * k) for n, k in shapes)


def test_of_two_limits_the_later_counts() -> None:
    ceilings = Ceilings(gb_s=10.0, bf16_tflop_s=2.0, int8_tops=4.0)
    assert ceilings.least_seconds(Work((), nbytes=1e10, operations=1e12)) == pytest.approx(1.0)
    assert ceilings.least_seconds(Work((), nbytes=1e9, operations=4e12)) == pytest.approx(2.0)
    assert ceilings.least_seconds(Work((), nbytes=1e9, operations=4e12, integers=True)) == pytest.approx(1.0)


def test_all_copies_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    calls = tuple(lambda name=name: seen.append(name) for name in "abc")  # type: ignore[misc]
    monkeypatch.setattr(kernels, "BUDGET", 0.0)
    ours, aten = medians(Work(calls, 1.0, aten=(lambda: seen.append("torch"),)))
    assert ours > 0
    assert aten is not None
    mine = "".join(name for name in seen if name != "torch")
    assert mine.startswith("abcabc")
    assert mine in "abc" * len(mine)
    assert medians(Work(calls, 1.0))[1] is None


def test_a_burst_is_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "seconds", lambda calls: 2.0 * len(calls))
    assert burst(iter([lambda: None] * 9), 4) == 2.0


@needs_library
@pytest.mark.usefixtures("little")
def test_it_tells_a_table_and_json(tmp_path: Path) -> None:
    result = invoke(
        "--rows", "1", "3", "--ops", "rms_norm", "attention", "--threads", "1", "--json", str(tmp_path / "k.json")
    )
    assert result.exit_code == 0, result.output
    assert "of the limit" in result.output
    told = json.loads((tmp_path / "k.json").read_text())
    assert told.keys() == {"threads", "ceilings", "rows"}
    assert told["threads"] == 1
    assert "1 threads: " in result.output, "those that were measured"
    assert told["ceilings"].keys() == {"gb_s", "bf16_tflop_s", "int8_tops"}
    assert all(row.keys() == KEYS for row in told["rows"])
    assert [(row["format"], row["rows"]) for row in told["rows"] if row["op"] == "rms_norm"] == [
        ("bf16", 1),
        ("bf16", 3),
    ]
    assert {row["format"] for row in told["rows"] if row["op"] == "attention"} == set(served("attention", SMALL))


@pytest.mark.usefixtures("little")
class TestRefusals:
    def test_a_gpu(self) -> None:
        result = invoke("--device", "cuda")
        assert result.exit_code == 1
        assert "bench/gpu_check.py" in result.output

    def test_rows(self) -> None:
        assert "rows are numbers from 1" in invoke("--rows", "0").output

    def test_an_unknown_op(self) -> None:
        result = invoke("--ops", "lineal")
        assert result.exit_code == 1
        assert "'lineal'" in result.output

    @needs_library
    def test_an_op_without_work(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.delitem(WORK, "rms_norm")
        assert "rms_norm" not in chosen((), SMALL)
        assert "rms_norm is not measured" in caplog.text
        with pytest.raises(ValueError, match=r"kernel_work\.py"):
            chosen(("rms_norm",), SMALL)

    def test_a_machine_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "_refusal", lambda op, format, shape: "there is none")
        with pytest.raises(ValueError, match="no compiled kernel runs here"):
            kernels.run(KernelsConfig())
