"""The inline assembly that unpacks four-bit codes: the interpreter cannot run it, so it is executed here."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("triton")

from quire.kernels.triton import tiles

# name -> (PTX of bytes, PTX of words, bits of a negative base, 16 bits -> number, number -> 16 bits)
KINDS = {
    "bf16": (
        tiles._HALVES_BF16.value,
        tiles._COLUMNS_BF16.value,
        0xC300,
        lambda bits: np.uint32(bits << 16).view(np.float32),
        lambda value: int(np.float32(value).view(np.uint32)) >> 16,
    ),
    "fp16": (
        tiles._HALVES_FP16.value,
        tiles._COLUMNS_FP16.value,
        0xE400,
        lambda bits: np.uint16(bits).view(np.float16),
        lambda value: int(np.float16(value).view(np.uint16)),
    ),
}


def execute(ptx: str, registers: dict[str, int], number: Callable, bits: Callable) -> dict[str, int]:
    """Run the instructions that the text has, as the PTX manual defines them; any other is an error."""
    value = dict(registers)
    for line in filter(None, (part.strip() for part in re.sub(r"[{}]", "", ptx).split(";"))):
        if line.startswith(".reg"):
            continue
        name, operands = line.split(None, 1)
        to, *rest = (text.strip() for text in operands.split(","))
        args = [int(text, 0) if text[0].isdigit() else value[text] for text in rest]
        if name == "mov.b32":
            result = args[0]
        elif name == "and.b32":
            result = args[0] & args[1]
        elif name == "shr.u32":
            result = args[0] >> args[1]
        elif name == "prmt.b32":
            both = args[0] | args[1] << 32
            result = sum((both >> 8 * (args[2] >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
        elif name == "lop3.b32":
            a, b, c, table = args
            result = sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            halves = [[number(arg >> shift & 0xFFFF) for arg in args] for shift in (0, 16)]
            low, high = (bits(float(a) * float(b) + float(c)) for a, b, c in halves)
            result = low | high << 16
        else:
            raise AssertionError(f"unknown instruction {line!r}")
        value[to] = result & 0xFFFFFFFF
    return value


def pair_of(word: int, number: Callable) -> list[float]:
    return [float(number(word & 0xFFFF)), float(number(word >> 16))]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_become_their_halves_minus_the_zeros(kind: str) -> None:
    ptx, _, base, number, bits = KINDS[kind]
    generator = np.random.default_rng(0)
    for _ in range(64):
        codes, zeros = generator.integers(0, 256, 4), generator.integers(0, 16, 4)
        offsets = [base | int(zero) for zero in zeros]
        registers = {
            "$4": sum(int(code) << 8 * i for i, code in enumerate(codes)),
            "$5": offsets[0] | offsets[1] << 16,
            "$6": offsets[2] | offsets[3] << 16,
        }
        out = execute(ptx, registers, number, bits)
        assert pair_of(out["$0"], number) + pair_of(out["$1"], number) == (codes % 16 - zeros).tolist()
        assert pair_of(out["$2"], number) + pair_of(out["$3"], number) == (codes // 16 - zeros).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_words_become_four_columns_of_two_rows(kind: str) -> None:
    _, ptx, base, number, bits = KINDS[kind]
    generator = np.random.default_rng(1)
    for _ in range(64):
        codes, zeros = generator.integers(0, 256, (2, 4)), generator.integers(0, 16, (4, 2))
        registers = {f"${8 + row}": sum(int(c) << 8 * i for i, c in enumerate(codes[row])) for row in (0, 1)}
        for column in range(4):
            # The two rows have one zero: the operand is one number twice, and comes as a pair of equal registers.
            offset = base | int(zeros[column, 0])
            registers |= {f"${10 + 2 * column}": offset | offset << 16, f"${11 + 2 * column}": offset | offset << 16}
        out = execute(ptx, registers, number, bits)
        for column in range(4):
            zero = zeros[column, 0]
            assert pair_of(out[f"${column}"], number) == (codes[:, column] % 16 - zero).tolist()
            assert pair_of(out[f"${4 + column}"], number) == (codes[:, column] // 16 - zero).tolist()
