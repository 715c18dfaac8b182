"""Rows by themselves, in C++: every instruction set, bits that nothing else decides, no torch between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quire.kernels.cpu.native import library
from quire.kernels.packed import QuantizedRows, RowFormat
from quire.kernels.testing import NAN, normal, pair

pytestmark = pytest.mark.skipif(library.problem is not None, reason=str(library.problem))
DTYPES = (torch.float32, torch.bfloat16)
E4M3 = torch.float8_e4m3fn
FORMATS = [
    RowFormat(torch.int8),
    RowFormat(torch.int8, scale=torch.tensor(0.03)),
    RowFormat(E4M3),
    RowFormat(E4M3, 128),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tensors(result: Any) -> list[Tensor]:
    """All that an op gave."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, QuantizedRows):
        return [result.codes.view(torch.uint8), result.scales]
    return [tensor for part in result for tensor in tensors(part)]


Arguments = Callable[[int, torch.dtype], tuple[Any, ...]]

# Of so many rows: the arguments of each op, rows of 131 or 262 entries, which no vector divides.
OPS: dict[str, Arguments] = {
    "embed": lambda n, dtype: (torch.arange(n) * 7 % 50, normal((50, 131), dtype), 3.5),
    "take_rows": lambda n, dtype: (normal((n, 131), dtype), torch.arange(n)),
    "route": lambda n, dtype: (normal((n, 131), dtype), 5, True),
    "soft_cap": lambda n, dtype: (40 * normal((n, 2501), torch.float32), 30.0),
    "add_residual": lambda n, dtype: (normal((n, 131), dtype), normal((n, 131), dtype, 1)),
    "add_gated": lambda n, dtype: (
        normal((n, 131), dtype),
        normal((n, 1), dtype, 1),
        normal((n, 131), dtype, 2),
    ),
    "rms_norm": lambda n, dtype: (normal((n, 131), dtype), normal((131,), dtype, 1), 1e-6, 1.0),
    "silu_and_mul": lambda n, dtype: (3 * normal((n, 2 * 2500), dtype),),
    "quantize_rows": lambda n, dtype: (normal((n, 131), dtype), FORMATS[0]),
    "rms_norm_rows": lambda n, dtype: (normal((n, 131), dtype), normal((131,), dtype, 1), 1e-6, 1.0, FORMATS[3]),
    "add_rms_norm_rows": lambda n, dtype: (
        normal((n, 131), dtype),
        normal((n, 131), dtype, 1),
        normal((131,), dtype, 2),
        1e-6,
        0.0,
        FORMATS[0],
    ),
    "silu_and_mul_rows": lambda n, dtype: (normal((n, 262), dtype), FORMATS[0]),
    "gelu_and_mul_rows": lambda n, dtype: (normal((n, 262), dtype), FORMATS[1]),
}


def first_rows(arguments: tuple[Any, ...], n: int, count: int) -> tuple[Any, ...]:
    """The arguments for the first of n rows, in memory that an op may overwrite."""
    return tuple(
        a[:count].clone() if isinstance(a, Tensor) and len(a) == n else a.clone() if isinstance(a, Tensor) else a
        for a in arguments
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("level")
def test_bits_do_not_depend_on_the_number_of_rows(op: str, dtype: torch.dtype) -> None:
    run = pair(op, "native")[0].run
    arguments = OPS[op](67, dtype)
    whole = tensors(run(*first_rows(arguments, 67, 67)))
    for count in (0, 1, 2, 15, 17, 33):
        for some, all_of_them in zip(tensors(run(*first_rows(arguments, 67, count))), whole, strict=True):
            assert torch.equal(some, all_of_them[:count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["embed", "take_rows", "route", "soft_cap", "add_residual", "add_gated"])
@pytest.mark.usefixtures("level")
def test_every_level_is_the_reference(op: str, dtype: torch.dtype) -> None:
    ours, oracle = pair(op, "native")
    arguments = OPS[op](35, dtype)
    expected = tensors(oracle.run(*first_rows(arguments, 35, 35)))
    for result, right in zip(tensors(ours.run(*arguments)), expected, strict=True):
        torch.testing.assert_close(result, right, rtol=2e-5 if result.dtype != torch.bfloat16 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", FORMATS, ids=["int8", "int8-static", "e4m3", "e4m3-128"])
@pytest.mark.usefixtures("level")
def test_codes_are_the_reference_s(dtype: torch.dtype, to: RowFormat) -> None:
    """Bit for bit of the same values, and next to it where the norm was summed in another order."""
    ours, oracle = pair("quantize_rows", "native")
    for width in (1, 15, 17, 128, 300):
        x = normal((9, width), torch.float32, width).exp().mul(normal((9, width), torch.float32)).to(dtype)
        x[3] = 0
        for result, right in zip(tensors(ours.run(x, to)), tensors(oracle.run(x, to)), strict=True):
            assert torch.equal(result, right)
    for op in ("rms_norm_rows", "add_rms_norm_rows", "silu_and_mul_rows", "gelu_and_mul_rows"):
        ours, oracle = pair(op, "native")
        arguments = [to if isinstance(a, RowFormat) else a for a in OPS[op](20, dtype)]
        expected = tensors(oracle.run(*(a.clone() if isinstance(a, Tensor) else a for a in arguments)))
        codes, scales, *total = tensors(ours.run(*arguments))
        torch.testing.assert_close(scales, expected[1], rtol=1e-5, atol=0)
        apart = (codes.int() - expected[0].int()).abs() % 255  # in int8, -1 is next to 0
        assert int(apart.max()) <= 1
        assert apart.float().mean() < 0.01
        assert all(torch.equal(sums, right) for sums, right in zip(total, expected[2:], strict=True))


@pytest.mark.usefixtures("level")
def test_every_number_of_e4m3() -> None:
    """The codes of all bf16 numbers in reach and of the middles between neighbours, by a scale of one."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat([codes, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(9e9))])
    bits = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = torch.cat([numbers, -numbers, bits[::5], -bits[::7], torch.tensor([NAN, 1e30, -1e30])])[None]
    to = RowFormat(E4M3, scale=torch.tensor(1.0))
    ours, oracle = pair("quantize_rows", "native")
    assert torch.equal(ours.run(x, to).codes.view(torch.uint8), oracle.run(x, to).codes.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.usefixtures("level")
def test_nan_stays_in_its_row(dtype: torch.dtype, bad: float) -> None:
    """In eight bits by its scale: whatever is made of the row is no number either."""
    x = normal((5, 262), dtype)
    x[2, 77] = bad
    good = [0, 1, 3, 4]
    for to in FORMATS if bad != bad else (FORMATS[0], FORMATS[2], FORMATS[3]):  # a fixed scale clamps infinity
        weight = torch.ones(262, dtype=dtype)
        for op, arguments in {
            "quantize_rows": (x, to),
            "rms_norm_rows": (x, weight, 1e-6, 0.0, to),
            "silu_and_mul_rows": (x, to),
        }.items():
            rows = pair(op, "native")[0].run(*arguments)
            clean = pair(op, "native")[0].run(x[good], *arguments[1:])
            assert torch.equal(rows.scales[good], clean.scales)
            assert torch.equal(rows.codes[good].view(torch.uint8), clean.codes.view(torch.uint8))
            product = (rows.codes.float().sum(-1) * rows.scales.sum(-1)).isfinite()
            assert product.tolist() == [True, True, False, True, True]


class Watch(TorchDispatchMode):
    """The torch operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_torch_does_no_more_than_to_give_memory(op: str) -> None:
    """What a tape cannot record would be missing when it is played."""
    arguments = OPS[op](5, torch.bfloat16)
    with Watch() as watch:
        pair(op, "native")[0].run(*arguments)
    assert watch.seen <= {"empty", "empty_like", "new_empty", "empty_strided"}
