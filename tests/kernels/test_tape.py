"""Tapes: a replay does what was recorded, with other rows and other inputs; what it would not repeat is refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from quire.kernels.cpu.native import library, tape
from quire.kernels.cpu.native.pages import CHUNK, SMALL, huge_empty
from quire.kernels.reference.rope import rope_table
from quire.kernels.testing import normal, pair

pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))

ROWS, DIM = 48, 64
norm = pair("rms_norm", "native")[0].run
add_norm = pair("add_rms_norm", "native")[0].run
silu = pair("silu_and_mul", "native")[0].run
rope = pair("rope", "native")[0].run


def chain(x: Tensor, weight: Tensor) -> Tensor:
    """Eight kernels, with memory that is let go of between."""
    residual = norm(x, weight, 1e-6, 0.0)
    y = norm(residual, weight, 1e-6, 1.0)
    for _ in range(3):
        wide = norm(y.view(-1, 2, DIM // 2), weight[: DIM // 2], 1e-6, 0.0).flatten(1)
        y, residual = add_norm(wide, residual, weight, 1e-6, 0.0)
    return silu(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_replay_is_the_function(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(ROWS, DIM, dtype=dtype), normal((DIM,), dtype, 1)
    recorded = tape.record(lambda: chain(x, weight), ROWS)
    assert len(recorded) == 9
    for count, seed in [(ROWS, 2), (1, 3), (17, 4), (0, 5), (ROWS, 6)]:
        fresh = normal((count, DIM), dtype, seed)
        x[:count] = fresh
        assert torch.equal(recorded.replay(count), chain(fresh.clone(), weight))


@torch.inference_mode()
def test_memory_is_used_again() -> None:
    x, weight = torch.zeros(ROWS, DIM), normal((DIM,), torch.float32)

    def long() -> Tensor:
        y = x
        for _ in range(20):
            y = norm(y, weight, 1e-6, 0.0)
        return y

    recorded = tape.record(long, ROWS)
    assert len({block.data_ptr() for block in recorded.memory}) == 2


@torch.inference_mode()
def test_a_failure_is_told_and_leaves_the_tape_whole() -> None:
    q, k = normal((ROWS, 1, 16), torch.float32), normal((ROWS, 1, 16), torch.float32, 1)
    positions, table = torch.zeros(ROWS, dtype=torch.int64), rope_table(16, 8, 1e4)
    recorded = tape.record(lambda: rope(q, k, positions, table, False)[0], ROWS)
    positions[3] = 8
    recorded.replay(3)
    with pytest.raises(IndexError, match="out of range"):
        recorded.replay(4)
    recorded.replay(3)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: norm(x + 1, w, 1e-6, 0.0), "aten.add"),
        (lambda x, w: norm(x, w, 1e-6, 0.0) * 2, "aten.mul"),
        (lambda x, w: norm(x[:5], w, 1e-6, 0.0), "5 rows where there are 48"),
        (lambda x, w: norm(x.T.contiguous().T, w, 1e-6, 0.0), "is no kernel"),
    ],
)
@torch.inference_mode()
def test_what_a_replay_would_not_repeat_is_refused(function: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    x, weight = normal((ROWS, DIM), torch.float32), normal((DIM,), torch.float32, 1)
    with pytest.raises(tape.Unrecordable, match=reason):
        tape.record(lambda: function(x, weight), ROWS)
    assert library.recording.note is None
    assert torch.isfinite(norm(x, weight, 1e-6, 0.0)).all()


@torch.inference_mode()
def test_other_threads_compute_while_one_records() -> None:
    """An engine that starts must not take the steps of one that serves for its own."""
    x, weight = normal((ROWS, DIM), torch.float32), normal((DIM,), torch.float32, 1)
    expected = norm(x, weight, 1e-6, 0.0)
    results: list[Tensor] = []
    with ThreadPoolExecutor(1) as elsewhere:

        def function() -> Tensor:
            results.append(elsewhere.submit(norm, x, weight, 1e-6, 0.0).result())
            return norm(x, weight, 1e-6, 0.0)

        recorded = tape.record(function, ROWS)
    assert len(recorded) == 1
    assert torch.equal(results[0], expected)
    assert torch.equal(recorded.replay(ROWS), expected)


class TestLargePages:
    def test_tensors_do_not_overlap(self) -> None:
        sizes = [1, SMALL + 1, SMALL * 3, CHUNK // 2, CHUNK // 2 + 1, SMALL]
        tensors = [huge_empty((size,), torch.uint8) for size in sizes]
        for i, tensor in enumerate(tensors):
            tensor.fill_(i)
        for i, tensor in enumerate(tensors):
            assert tensor.unique().tolist() == [i]
            assert tensor.data_ptr() % 64 == 0 or len(tensor) < SMALL

    def test_shapes_and_dtypes(self) -> None:
        weight = huge_empty((257, 3, 64), torch.bfloat16)
        assert weight.shape == (257, 3, 64)
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous()
