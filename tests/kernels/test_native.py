"""The compiled kernels beyond what every implementation is tested for: each instruction set, bits, limits, refusals."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from quire.kernels import Target
from quire.kernels.batch import KVSpec, LayerKV, RaggedBatch
from quire.kernels.cpu.native import library
from quire.kernels.reference.rope import rope_table
from quire.kernels.testing import FORMATS, assert_close, grow_tree, make_batch, make_cache, normal, pair

pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))
DTYPES = (torch.float32, torch.bfloat16)


def attend(
    name: str,
    batch: RaggedBatch,
    cache: LayerKV,
    q: Tensor,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    implementation, _ = pair("attention", name)
    plan = implementation.prepare(batch, cache.spec.block_size, window)
    return implementation.run(q, cache, plan, q.shape[2] ** -0.5, softcap, sinks)


def check(batch: RaggedBatch, cache: LayerKV, q: Tensor, **options: object) -> None:
    results = [attend(name, batch, cache, q, **options) for name in ("native", "reference")]  # type: ignore[arg-type]
    assert_close(results[0][0], results[1][0], q.dtype)
    assert_close(results[0][1], results[1][1], q.dtype)


@pytest.mark.usefixtures("level", "two_threads")
class TestLevels:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [16, 48, 64, 96, 128])
    def test_attention(self, dtype: torch.dtype, dim: int) -> None:
        batch = make_batch([1, 40, 5, 1], [700, 70, 1100, 3], block_size=16)
        grow_tree(batch, 2, [-1, -1, 0, 1])
        cache = make_cache(batch, KVSpec(16, 2, dim, FORMATS[dtype]))
        q = normal((batch.num_tokens, 6, dim), dtype)
        check(batch, cache, q)
        check(batch, cache, q, window=70, softcap=4.0, sinks=normal((6,), torch.float32))

    @pytest.mark.parametrize("block_size", [1, 24, 64, 256])
    def test_block_sizes(self, block_size: int) -> None:
        batch = make_batch([1, 9], [129, 60], block_size=block_size)
        cache = make_cache(batch, KVSpec(block_size, 1, 32, "bf16"))
        check(batch, cache, normal((10, 1, 32), torch.bfloat16))

    @pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
    def test_a_cache_of_another_dtype(self, dtype: torch.dtype, kept: str) -> None:
        batch = make_batch([1, 9], [129, 60], block_size=16)
        cache = make_cache(batch, KVSpec(16, 2, 32, kept))
        k, v = normal((10, 2, 32), dtype, 1), normal((10, 2, 32), dtype, 2)
        pair("kv_write", "native")[0].run(k, v, cache, batch.slot_mapping)
        assert torch.equal(cache.k.flatten(0, 1)[batch.slot_mapping], k.to(cache.k.dtype))
        check(batch, cache, normal((10, 4, 32), dtype))

    def test_scores_that_keep_rising(self) -> None:
        """Each tile of keys has a larger maximum than all before, up to scores of 300."""
        batch = make_batch([2], [400], block_size=16)
        cache = make_cache(batch, KVSpec(16, 1, 32, "fp32"))
        slots = batch.block_table[0].long().repeat_interleave(16) * 16 + torch.arange(16).repeat(26)
        cache.k.flatten(0, 1)[slots[:402]] = torch.linspace(-1, 1, 402)[:, None, None].expand(402, 1, 32).contiguous()
        q = torch.full((2, 1, 32), 300 / 32**0.5)
        o, lse = attend("native", batch, cache, q)
        expected, expected_lse = attend("reference", batch, cache, q)
        torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)  # a score of 300 is rounded by 3e-5
        torch.testing.assert_close(lse, expected_lse)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rowwise(self, dtype: torch.dtype) -> None:
        x, weight = normal((70, 131), dtype), normal((131,), dtype, 1)
        ours, oracle = pair("rms_norm", "native")
        assert_close(ours.run(x, weight, 1e-6, 1.0), oracle.run(x, weight, 1e-6, 1.0), dtype)
        wide = weight.float()  # a norm's weight may stay in fp32
        assert_close(ours.run(x, wide, 1e-6, 1.0), oracle.run(x, wide, 1e-6, 1.0), dtype)
        for op in ("silu_and_mul", "gelu_and_mul"):
            ours, oracle = pair(op, "native")
            assert_close(ours.run(4 * x[:, :130]), oracle.run(4 * x[:, :130]), dtype)
        table, positions = rope_table(40, 99, 1e4), torch.arange(70)
        ours, oracle = pair("rope", "native")
        for interleaved in (False, True):
            q, k = normal((70, 3, 48), dtype), normal((70, 2, 48), dtype, 1)
            expected = oracle.run(q.clone(), k.clone(), positions, table, interleaved)
            for turned, right in zip(ours.run(q, k, positions, table, interleaved), expected, strict=True):
                assert_close(turned, right, dtype)

    def test_activations_everywhere(self) -> None:
        gate = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([0.0, -0.0, 90.0, -90.0, 1e4, -1e4, 1e30])])
        x = torch.stack([gate, torch.ones_like(gate)], dim=1).T.reshape(1, -1)
        exact = torch.nn.functional.silu(gate.double())
        # exp(30) has an exponent of 43, whose rounding is 2e-6 of the result; -1e4 times 2^-126 is not quite 0.
        torch.testing.assert_close(pair("silu_and_mul", "native")[0].run(x)[0].double(), exact, rtol=3e-6, atol=2e-34)
        exact = torch.nn.functional.gelu(gate.double(), approximate="tanh")
        torch.testing.assert_close(pair("gelu_and_mul", "native")[0].run(x)[0].double(), exact, rtol=2e-6, atol=2e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rounding_is_to_nearest_even(self, dtype: torch.dtype) -> None:
        x = normal((4, 160), torch.float32).exp().to(dtype)
        residual = normal((4, 160), dtype, 1)
        expected = x + residual
        _, total = pair("add_rms_norm", "native")[0].run(x, residual, torch.ones(160, dtype=dtype), 1e-6, 0.0)
        assert torch.equal(total, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_stays_in_its_row(self, dtype: torch.dtype) -> None:
        batch = make_batch([4, 1], [30, 100], block_size=16)
        cache = make_cache(batch, KVSpec(16, 2, 32, FORMATS[dtype]))
        q = normal((5, 4, 32), dtype)
        q[2, 1, 7] = float("nan")
        o, lse = attend("native", batch, cache, q)
        assert o[2, 1].isnan().all()
        assert lse[2, 1].isnan()
        assert o.isnan().sum() == 32
        x = torch.full((1, 64), float("nan"), dtype=dtype)
        assert pair("silu_and_mul", "native")[0].run(x).isnan().all()
        assert pair("rms_norm", "native")[0].run(x, x[0], 1e-6, 0.0).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50, 700])
@pytest.mark.usefixtures("level", "two_threads")
def test_bits_depend_on_the_row_alone(dtype: torch.dtype, window: int | None) -> None:
    """Not on batch-mates, on threads, on the cut into chunks, or on whether a long context was split."""
    q_lens, contexts = [1, 1, 5, 40, 33, 1, 3], [100, 7, 60, 90, 0, 3000, 1200]
    batch = make_batch(q_lens, contexts, block_size=16)
    cache = make_cache(batch, KVSpec(16, 2, 32, FORMATS[dtype]))
    q = normal((batch.num_tokens, 6, 32), dtype)
    together, lse_together = attend("native", batch, cache, q, window)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for s, (rows, context) in enumerate(zip(q_lens, contexts, strict=True)):
            for pieces in ([rows], [1] * rows, [rows // 2, rows - rows // 2]):
                start = 0
                for count in pieces:
                    piece = make_batch([count], [context + start], block_size=16)
                    piece.block_table = batch.block_table[s : s + 1, : piece.block_table.shape[1]].contiguous()
                    mine = slice(int(batch.cu_q[s]) + start, int(batch.cu_q[s]) + start + count)
                    o, lse = attend("native", piece, cache, q[mine], window)
                    assert torch.equal(o, together[mine])
                    assert torch.equal(lse, lse_together[mine])
                    start += count


def test_rows_behind_the_last_sequence() -> None:
    batch = make_batch([1, 2], [10, 0], block_size=16)
    cache = make_cache(batch, KVSpec(16, 2, 32, "fp32"))
    q = normal((3, 4, 32), torch.float32)
    batch.cu_q, batch.seq_lens, batch.block_table = batch.cu_q[:2], batch.seq_lens[:1], batch.block_table[:1]
    check(batch, cache, q)
    check(batch, cache, q, sinks=normal((4,), torch.float32))


class TestLimits:
    def test_positions(self) -> None:
        q, table = normal((2, 1, 16), torch.float32), rope_table(16, 8, 1e4)
        for bad in (8, -1):
            with pytest.raises(IndexError, match="rope table of 8 rows"):
                pair("rope", "native")[0].run(q, q.clone(), torch.tensor([0, bad]), table, False)

    def test_slots(self) -> None:
        batch = make_batch([1], [3], block_size=4)
        cache = make_cache(batch, KVSpec(4, 1, 16, "fp32"))
        k = normal((2, 1, 16), torch.float32)
        for bad in (cache.k.shape[0] * 4, -1):
            with pytest.raises(IndexError, match="outside of the cache"):
                pair("kv_write", "native")[0].run(k, k, cache, torch.tensor([0, bad]))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_blocks(self, dtype: torch.dtype) -> None:
        batch = make_batch([1], [40], block_size=16)
        cache = make_cache(batch, KVSpec(16, 1, 32, FORMATS[dtype]))
        q = normal((1, 1, 32), dtype)
        for bad in (cache.k.shape[0], -1):
            batch.block_table[0, 1] = bad
            with pytest.raises(IndexError, match="outside of the cache"):
                attend("native", batch, cache, q)
        batch.seq_lens[0] = 49
        with pytest.raises(IndexError, match="past its block table"):
            attend("native", batch, cache, q)


class TestRefusals:
    @pytest.mark.parametrize(
        ("target", "reason"),
        [
            (Target("cuda", torch.float32, 64, "fp32"), "runs on cpu"),
            (Target("cpu", torch.float16, 64, "fp32"), "the target in float16"),
            (Target("cpu", torch.float32, 64, "int4"), "the cache holds int4"),
            (Target("cpu", torch.float32, 72, "fp32"), "multiple of 16, the target's is 72"),
        ],
    )
    def test_targets(self, target: Target, reason: str) -> None:
        assert reason in str(pair("attention", "native")[0].when(target))

    def test_a_library_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "_find", lambda: None)
        assert "not built" in str(library._load()[1])

    @pytest.mark.parametrize(("name", "fields"), [("norm", "ip"), ("abnormal", "ip")])
    def test_a_library_that_was_built_from_other_sources(self, name: str, fields: str) -> None:
        with pytest.raises(RuntimeError, match="install quire again"):
            library.Kernel(name, fields)

    def test_an_unknown_level(self) -> None:
        with pytest.raises(ValueError, match="not among"):
            library.use_level(9)


def silu(x: Tensor) -> Tensor:
    return pair("silu_and_mul", "native")[0].run(x)


class TestThreads:
    def test_as_many_as_torch_has(self) -> None:
        code = (
            "import os, torch, quire.kernels as k\n"
            "x, silu = torch.ones(512, 2048), k.implementations('silu_and_mul')['native'].run\n"
            "for threads in (1, 3, 2):\n"
            "    torch.set_num_threads(threads)\n"
            "    before = len(os.listdir('/proc/self/task'))\n"
            "    silu(x)\n"
            "    print(len(os.listdir('/proc/self/task')) - before)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["0", "2", "0"], done.stdout + done.stderr

    @pytest.mark.usefixtures("two_threads")
    def test_callers_in_several_threads(self) -> None:
        inputs = [normal((64, 2048), torch.float32, seed) for seed in range(8)]
        expected = [silu(x) for x in inputs]
        with ThreadPoolExecutor(4) as callers:
            for result, right in zip(callers.map(silu, inputs * 20), expected * 20, strict=True):
                assert torch.equal(result, right)

    @pytest.mark.usefixtures("two_threads")
    def test_a_failure_leaves_the_threads_at_work(self) -> None:
        q, table = normal((4096, 1, 16), torch.float32), rope_table(16, 8, 1e4)
        positions = torch.zeros(4096, dtype=torch.int64)
        for bad in range(0, 4096, 64):
            positions[bad] = 8
            with pytest.raises(IndexError):
                pair("rope", "native")[0].run(q, q.clone(), positions, table, False)
            positions[bad] = 0
        pair("rope", "native")[0].run(q, q.clone(), positions, table, False)

    def test_a_forked_child_has_threads_of_its_own(self) -> None:
        code = (
            "import os, torch, quire.kernels as k\n"
            "torch.set_num_threads(2)\n"
            "x, silu = torch.ones(512, 2048), k.implementations('silu_and_mul')['native'].run\n"
            "silu(x)\n"
            "child = os.fork()\n"
            "silu(x)\n"
            "child or os._exit(7)\n"
            "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.split() == ["7"], done.stdout + done.stderr
