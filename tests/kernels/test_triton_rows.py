"""The Triton row kernels where their launches differ: strides, cut rows, odd widths, in place."""

from __future__ import annotations

import pytest
import torch

from quire.kernels import implementations
from quire.kernels.packed import RowFormat
from quire.kernels.reference.rope import rope_table
from quire.kernels.testing import NAN, assert_close, cases, device_of, normal, pair

pytestmark = pytest.mark.skipif(
    "triton" not in {name for name, _ in cases("rms_norm")}, reason="Triton runs on a GPU or in its interpreter"
)
DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.bfloat16]


def poisoned(shape: tuple[int, int], wide: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows [T, d] of a tensor [T, wide] whose other columns are NaN."""
    whole = torch.full((shape[0], wide), NAN, dtype=dtype)
    whole[:, : shape[1]] = normal(shape, dtype, seed)
    return whole.to(DEVICE)[:, : shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [7, 96, 896])
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
def test_norms_of_strided_rows(d: int, tokens: int, dtype: torch.dtype) -> None:
    x, residual = (poisoned((tokens, d), d + 9, dtype, seed) for seed in (0, 1))
    weight = poisoned((1, d), d + 30, dtype, 2)[0]
    ours, oracle = pair("rms_norm", "triton")
    assert_close(ours.run(x, weight, 1e-6, 1.0), oracle.run(x, weight, 1e-6, 1.0), dtype)
    ours, oracle = pair("add_rms_norm", "triton")
    expected = oracle.run(x, residual, weight, 1e-6, 0.0)
    outer = x._base
    normed, total = ours.run(x, residual, weight, 1e-6, 0.0)
    assert_close(normed, expected[0], dtype)
    assert_close(total, expected[1], dtype)
    assert outer is not None
    assert bool(outer[:, d:].isnan().all()), "written beyond the rows"


@pytest.mark.parametrize("heads", [1, 3, 20])
def test_norms_of_heads_in_a_joined_qkv(heads: int) -> None:
    qkv = normal((5, heads + 2, 64), torch.float32).to(DEVICE)
    qkv[:, heads:] = NAN
    weight = normal((64,), torch.float32, 1).to(DEVICE)
    ours, oracle = pair("rms_norm", "triton")
    q = qkv[:, :heads]
    assert_close(ours.run(q, weight, 1e-6, 0.0), oracle.run(q, weight, 1e-6, 0.0), torch.float32)


@pytest.mark.parametrize("op", ["silu_and_mul", "gelu_and_mul"])
@pytest.mark.parametrize("f", [7, 96, 1500])
def test_gates_of_strided_rows(op: str, f: int) -> None:
    ours, oracle = pair(op, "triton")
    for tokens in (0, 1, 5):
        x = poisoned((tokens, 2 * f), 2 * f + 5, torch.float32)
        assert_close(ours.run(x), oracle.run(x), torch.float32)


def test_gates_saturate() -> None:
    x = torch.tensor([[60.0, -60.0, 20.0, 0.0, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    for op in ("silu_and_mul", "gelu_and_mul"):
        ours, oracle = pair(op, "triton")
        torch.testing.assert_close(ours.run(x), oracle.run(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rotary_dim", "d"), [(2, 7), (24, 96), (96, 96)])
def test_rope_turns_its_columns_alone(rotary_dim: int, d: int, interleaved: bool) -> None:
    ours, oracle = pair("rope", "triton")
    table = rope_table(rotary_dim, 40, 1e4).to(DEVICE)
    for tokens in (1, 5):
        qkv = normal((tokens, 9, d), torch.float32).to(DEVICE)
        before = qkv.clone()
        positions = (torch.arange(tokens, device=DEVICE) * 7).int()
        expected = oracle.run(before[:, :5], before[:, 5:7], positions, table, interleaved)
        turned = ours.run(qkv[:, :5], qkv[:, 5:7], positions, table, interleaved)
        for got, wanted in zip(turned, expected, strict=True):
            assert_close(got, wanted, torch.float32)
            assert torch.equal(got[..., rotary_dim:], wanted[..., rotary_dim:])
        assert torch.equal(qkv[:, 7:], before[:, 7:])


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 300.0, -300.0]], device=DEVICE)
    rows = implementations("quantize_rows")["triton"].run(x, RowFormat(torch.int8, scale=torch.ones((), device=DEVICE)))
    assert rows.codes.tolist() == [[0, 2, 2, 0, -2, 126, 127, -127]]


def test_every_e4m3_number_is_its_own_code_and_between_two_the_nearest_is() -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].unique()
    middles = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middles, middles * 1.001, middles * 0.999, torch.tensor([1e4, -1e4])])[None].to(DEVICE)
    to = RowFormat(torch.float8_e4m3fn, scale=torch.ones((), device=DEVICE))
    ours, oracle = pair("quantize_rows", "triton")
    assert torch.equal(ours.run(x, to).codes.float(), oracle.run(x, to).codes.float())


def test_a_group_that_no_kernel_has() -> None:
    with pytest.raises(ValueError, match=r"RowFormat\.group is 64; rows are quantized whole \(0\) or in groups of 128"):
        implementations("quantize_rows")["triton"].run(torch.zeros(1, 128, device=DEVICE), RowFormat(torch.int8, 64))
