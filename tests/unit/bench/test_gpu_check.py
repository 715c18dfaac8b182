"""The GPU check on a machine without one: its correctness section in the interpreter, its isolation, and every timed
section rehearsed at tiny sizes with a clock that does not measure."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.bench import gpu_attention, gpu_ceilings, gpu_clock, gpu_correct, gpu_model, gpu_products, gpu_small
from quire.bench.gpu_check import ceilings_of
from quire.bench.gpu_clock import Ceilings, Timing
from quire.bench.gpu_inputs import Sizes, all_cases
from quire.bench.gpu_isolation import run_section, run_shards
from quire.bench.gpu_rows import ERROR, Item, Row, condensed, summary, table
from quire.kernels import implementations, ops

ROOT = Path(__file__).resolve().parents[3]
CEILINGS = Ceilings(copy=3e12, bf16=8e14, fp8=1.6e15, int8=None)


def run_items(items: Any) -> list[Row]:
    rows = [row for item in items for row in item.run()]
    assert rows
    assert not [row for row in rows if row.status in ("wrong", "failed")]
    assert table(rows)
    return rows


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is made once and is said to have taken a millisecond."""

    def once(calls: Any, replays: int = 0) -> Timing:
        for call in calls:
            call()
        return Timing(1e-3, captured=True)

    ticks = iter(range(1, 10_000))

    def launched(call: Any, replays: int = 0) -> float:
        call()
        return 1e-3 / next(ticks)  # ever shorter, so that differences are positive

    def captured(call: Any) -> Any:
        result = call()
        return lambda: result.copy_(call()), result

    for module in (gpu_attention, gpu_ceilings, gpu_model, gpu_products, gpu_small):
        for name, stand_in in (
            ("time_calls", once),
            ("time_launched", launched),
            ("capture", captured),
            ("copies_beyond_l2", lambda nbytes: 2),
            ("free_memory", lambda: 1 << 40),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)


# --- correctness -----------------------------------------------------------------------------------------------------


def test_every_op_has_inputs() -> None:
    assert {case.op for case in all_cases(Sizes(tiny=True))} == set(ops())


@pytest.mark.parametrize("name", ["cpu", "native"])
def test_other_implementations_pass_the_check(name: str) -> None:
    if not any(name in implementations(op) for op in ops()):
        pytest.skip(f"no {name} kernels here")
    run_items(gpu_correct.items("cpu", Sizes(tiny=True), name, (0, 0)))


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    silu = implementations("silu_and_mul")
    wrong = replace(silu["reference"], name="cpu", run=lambda x: silu["reference"].run(x) * 1.05)
    monkeypatch.setitem(silu, "cpu", wrong)
    rows = next(i for i in gpu_correct.items("cpu", Sizes(True), "cpu", (0, 0)) if i.key == "silu_and_mul 1").run()
    assert {row.status for row in rows} == {"wrong"}


def test_a_kernel_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    silu = implementations("silu_and_mul")
    monkeypatch.setitem(silu, "cpu", replace(silu["reference"], run=lambda x: x.nonsense))
    rows = next(i for i in gpu_correct.items("cpu", Sizes(True), "cpu", (0, 0)) if i.key == "silu_and_mul 1").run()
    assert {row.status for row in rows} == {"failed"}
    assert "nonsense" in rows[0].note


def test_comparison() -> None:
    x, inf, nan = torch.ones(4), torch.inf, torch.nan
    assert gpu_correct.compare(x, x) == (0, 0, 0)
    assert gpu_correct.compare(x * 1.1, x)[0] == pytest.approx(0.1, rel=1e-3)
    assert gpu_correct.compare(torch.tensor([1, 2]), torch.tensor([1, 3]))[2] == 0.5
    assert gpu_correct.compare(torch.tensor([1.0, inf]), torch.tensor([1.0, -inf]))[2] == 0.5
    assert gpu_correct.compare(torch.tensor([1.0, nan]), torch.tensor([1.0, nan])) == (0, 0, 0)
    assert gpu_correct.compare(torch.tensor([nan]), torch.tensor([1.0]))[0] == inf
    with pytest.raises(ValueError, match="shapes"):
        gpu_correct.compare(x, x[:2])


# --- timed sections, rehearsed ---------------------------------------------------------------------------------------


def test_ceilings(still_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ceilings, "SIZE", 32)
    monkeypatch.setattr(gpu_ceilings, "COPIED", 1024)
    rows = [row for item in gpu_ceilings.items() if item.key in ("copy", "bf16", "fp8") for row in item.run()]
    found = ceilings_of(rows)
    assert found == {"copy": 2 * 1024 / 1e-3, "bf16": pytest.approx(2 * 32**3 / 1e-3)}
    assert ceilings_of(rows[:1]) is None


@pytest.mark.parametrize("quick", [True, False])
def test_attention_section(still_clock: None, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    original = gpu_attention.setup
    rows = list(gpu_attention.items(quick, CEILINGS))
    assert any("decode 64 x 4k bf16" in item.key for item in rows)
    monkeypatch.setattr(gpu_attention, "setup", lambda kv, q, c, n: original(kv, [1, 2], [20, 3], n))
    monkeypatch.setattr(gpu_attention, "_dense_decode", lambda *shape: 1e-3)
    small = [item for item in rows if "8k" not in item.key and "4 x 2k" not in item.key]
    run_items(small[:: 1 if quick else 5])


def test_attention_against_dense(still_clock: None) -> None:
    rows = gpu_attention._decode("few", "bf16", [2] * 3, [30] * 3, 0.8, CEILINGS)
    assert rows[0].peer == 1.0
    assert rows[0].status == "below"
    rows = gpu_attention._prompt("few", "bf16", [16] * 2, [0] * 2, 0.6, CEILINGS)
    assert rows[0].peer == 1.0
    assert "reference" in rows[0].note or "native" in rows[0].note


def test_products(still_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_products, "SHAPES", (("tiny", 384, 256),))
    monkeypatch.setattr(gpu_products, "MIXTURES", (("tiny", 4, 2, 256, 128),))
    rows = run_items(gpu_products.linear_items(True, CEILINGS))
    assert {row.status for row in rows if "int4" in row.name and "M=1024" not in row.name} == {"below"}
    run_items(gpu_products.moe_items(True, CEILINGS))


def test_small_kernels(still_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_small, "VOCAB", 500)
    monkeypatch.setattr(gpu_small, "HIDDEN", 128)
    monkeypatch.setattr(gpu_small, "FFN", 256)
    run_items(gpu_small.items(True, CEILINGS))


def shrink_model(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"hidden": 256, "ffn": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "vocab_size": 300}
    small = replace(gpu_model.LLAMA_8B, **changes, num_layers=2, layer_ropes=(0, 0), windows=(None, None))
    monkeypatch.setattr(gpu_model, "LLAMA_8B", small)
    monkeypatch.setattr(gpu_model, "CONTEXT", 20)
    monkeypatch.setattr(gpu_model, "PROMPT", 40)


def test_model(still_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_model(monkeypatch)
    items = list(gpu_model.items(True, CEILINGS))
    rows = run_items(items[:-1])
    assert any("replayed" in row.name and row.figure == 0 for row in rows)
    assert any("graph" in row.name for row in rows)


@pytest.mark.slow  # transformers takes ten seconds to import
def test_the_peer(still_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_model(monkeypatch)
    peer = list(gpu_model.items(True, CEILINGS))[-1]
    assert run_items([peer])[0].figure is not None


def test_a_process_that_only_compiles_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_clock, "_measures", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu_clock.only_compile()
    made: list[int] = []
    assert gpu_clock.time_calls([lambda: made.append(1), lambda: made.append(2)]).seconds == 1.0
    assert made == [1]
    assert gpu_clock.copies_beyond_l2(1) == 1


def test_copies_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        L2_cache_size = 50_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    assert gpu_clock.copies_beyond_l2(1 << 30) == 1
    assert gpu_clock.copies_beyond_l2(30_000_000) == 5
    assert gpu_clock.copies_beyond_l2(1) == gpu_clock.MOST_COPIES


# --- isolation -------------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
from quire.bench.gpu_isolation import shard_of, work
from quire.bench.gpu_rows import Item, Row

def good(key): return lambda: [Row("s", key)]
def raises(): raise ValueError("only this one")
def faults(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def dies(): print("last words"); sys.stdout.flush(); os._exit(9)
def hangs(): time.sleep(60)

def items(section, context):
    runs = {"raises": raises, "faults": faults, "dies": dies, "hangs": hangs}
    runs |= {"good": good("good"), "last": good("last")}
    return shard_of([Item(key, runs[key]) for key in context["keys"]], context)

sys.exit(work(items))
"""


def isolated(keys: list[str], seconds: float = 60.0, item_seconds: float = 30.0) -> dict[str, Row]:
    rows = run_section([sys.executable, "-c", WORKER], "s", {"keys": keys}, seconds, item_seconds)
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def test_what_raises_faults_or_dies_is_a_row_and_the_rest_runs() -> None:
    rows = isolated(["good", "raises", "faults", "dies", "last"])
    assert [row.status for row in rows.values()] == ["ok", "failed", "failed", "failed", "ok"]
    assert "only this one" in rows["raises"].note
    assert "illegal memory access" in rows["faults"].note
    assert "last words" in rows["dies"].note


def test_what_hangs_is_ended() -> None:
    rows = isolated(["hangs", "last"], item_seconds=3.0)
    assert rows["hangs"].status == "failed"
    assert "no end after" in rows["hangs"].note
    assert rows["last"].status == "ok"


def test_a_section_ends_in_time() -> None:
    rows = isolated(["good", "hangs", "last"], seconds=3.0)
    assert rows["good"].status == "ok"
    assert {rows["hangs"].status, rows["last"].status} == {"skipped"}


def test_shards_share_the_items() -> None:
    command = [sys.executable, "-c", WORKER]
    rows = run_shards(command, "s", {"keys": ["last", "dies", "good", "raises"]}, 60.0, shards=3)
    assert [(row.name, row.status) for row in rows] == [
        ("dies", "failed"),
        ("good", "ok"),
        ("last", "ok"),
        ("raises", "failed"),
    ]


def test_a_worker_that_cannot_start_is_a_row() -> None:
    rows = run_section([sys.executable, "-c", "raise SystemExit('no torch here')"], "s", {}, 30.0)
    assert [row.status for row in rows] == ["failed"]
    assert "no torch here" in rows[0].note


# --- the command -----------------------------------------------------------------------------------------------------


def test_interpreted_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--interpret", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    result = json.loads(out.read_text())
    wrong = [row for row in result["rows"] if row["status"] in ("wrong", "failed")]
    assert wrong == [], done.stdout
    assert done.returncode == 0
    assert {row["status"] for row in result["rows"]} <= {"ok", "skipped"}
    assert result["card"] == "interpreter"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "--interpret" in done.stderr


def test_rows_read_well() -> None:
    rows = [Row("a", "x", seconds=12e-6, figure=2.5e3, unit="GB/s", share=0.83, peer=1.2, target="80 %", note="n")]
    text = table([*rows, Row("b", "y", "skipped", note="why")])
    assert "12.0 µs" in text
    assert "83 %" in text
    assert "target 80 %; n" in text
    assert summary(rows) == "1 rows: 1 ok"
    compared = [Row("c", f"op {i}", figure=i / 10, unit=ERROR) for i in range(3)]
    short = condensed([*compared, Row("c", "op 3", "wrong", unit=ERROR)])
    assert [(row.name, row.status, row.figure) for row in short] == [
        ("op: 3 cases", "ok", 0.2),
        ("op 3", "wrong", None),
    ]
    assert Item("k", list) == Item("k", dict)
