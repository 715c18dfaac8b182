"""Softmax of the compiled attention where its exponent moves: scores that rise from tile to tile, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire.kernels.batch import KVSpec, LayerKV, RaggedBatch
from quire.kernels.cpu.native import library
from quire.kernels.testing import assert_close, make_batch, make_cache, normal, pair

pytestmark = [
    pytest.mark.skipif(library.problem is not None, reason=str(library.problem)),
    pytest.mark.usefixtures("level", "two_threads"),
]
BLOCK = 16


def attend(name: str, batch: RaggedBatch, cache: LayerKV, q: Tensor) -> Tensor:
    implementation, _ = pair("attention", name)
    plan = implementation.prepare(batch, BLOCK, None)
    return implementation.run(q, cache, plan, 1.0, 0.0, None)[0]


@pytest.mark.parametrize("kept", ["bf16", "int8_per_token_head"])
@pytest.mark.parametrize("top", [4.0, 30.0, 400.0])
def test_rising_scores(kept: str, top: float) -> None:
    """From 0 to `top` by steps of a seventh at 60 keys each; half of the heads see them fall instead."""
    batch = make_batch([20], [400], BLOCK)
    cache = make_cache(batch, KVSpec(BLOCK, 1, 64, kept))
    positions = torch.arange(420)
    slots = batch.block_table[0].long()[positions // BLOCK] * BLOCK + positions % BLOCK
    k = torch.zeros(420, 1, 64)
    k[:, 0, 0] = (positions // 60 / 7).bfloat16().float()
    pair("kv_write", "reference")[0].run(k, normal((420, 1, 64), torch.float32), cache, slots)
    q = torch.zeros(20, 4, 64)
    q[..., 0] = torch.tensor([top, -top, top, -top])
    q = q.bfloat16()
    ours = attend("native", batch, cache, q)
    assert_close(ours, attend("reference", batch, cache, q), q.dtype)
    last = make_batch([1], [419], BLOCK)
    last.block_table = batch.block_table
    assert torch.equal(attend("native", last, cache, q[19:])[0], ours[19])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    batch = make_batch([33], [200], BLOCK)
    cache = make_cache(batch, KVSpec(BLOCK, 1, 64, "fp32" if dtype == torch.float32 else "bf16"))
    q = normal((33, 3, 64), dtype)
    clean = attend("native", batch, cache, q)
    q[17, 1] = torch.nan
    ours = attend("native", batch, cache, q)
    assert ours[17, 1].isnan().all()
    ours[17, 1] = clean[17, 1]
    assert torch.equal(ours, clean)
