"""What the matrix products share: where a program works, four-bit codes as numbers, the end of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """(row tile, column tile) of a program: eight row tiles side by side, so that neighbours share x and w in L2."""
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = program // (8 * across)
    height = min(down - band * 8, 8)
    inside = program % (8 * across)
    return band * 8 + inside % height, inside // height


# Four codes in a register, $4, as their low halves ($0, $1) and high halves ($2, $3); $5 and $6 are the offsets.
#
# A nibble becomes the last mantissa bits of base + code, where the base is the power of two whose last mantissa bit is
# worth one (128 in bf16, 1024 in fp16); adding -(base + zero) leaves code - zero. There is no conversion in it.
_HALVES = """{
    .reg .b32 low, high, one;
    mov.b32 one, ONES;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 $0, low, BASE, 0x4140;
    prmt.b32 $1, low, BASE, 0x4342;
    prmt.b32 $2, high, BASE, 0x4140;
    prmt.b32 $3, high, BASE, 0x4342;
    fma.rn.TYPE $0, $0, one, $5;
    fma.rn.TYPE $1, $1, one, $6;
    fma.rn.TYPE $2, $2, one, $5;
    fma.rn.TYPE $3, $3, one, $6;
}"""
# The same of two rows of words, $8 and $9, of four codes each: $0 .. $3 are the low halves of the words' bytes 0 .. 3,
# $4 .. $7 the high ones, two rows in each; $10, $12, $14, $16 the offsets. 24 instructions for 16 weights.
_COLUMNS = (
    "{\n.reg .b32 pair, one;\nmov.b32 one, ONES;\n"
    + "".join(
        f"""
    prmt.b32 pair, $8, $9, 0x0{4 + byte}0{byte};
    lop3.b32 ${byte}, pair, 0x000f000f, BASE, 0xea;
    shr.u32 pair, pair, 4;
    lop3.b32 ${4 + byte}, pair, 0x000f000f, BASE, 0xea;
    fma.rn.TYPE ${byte}, ${byte}, one, ${10 + 2 * byte};
    fma.rn.TYPE ${4 + byte}, ${4 + byte}, one, ${10 + 2 * byte};
    """
        for byte in range(4)
    )
    + "}"
)


def _in(dtype: str, ptx: str, bytewise: bool) -> str:
    ones, base, kind = {"bf16": ("0x3f80", "43", "bf16x2"), "fp16": ("0x3c00", "64", "f16x2")}[dtype]
    spread = base * 4 if bytewise else f"{base}00" * 2
    return ptx.replace("ONES", ones + ones[2:]).replace("BASE", "0x" + spread).replace("TYPE", kind)


_HALVES_BF16, _HALVES_FP16 = (tl.constexpr(_in(dtype, _HALVES, True)) for dtype in ("bf16", "fp16"))
_COLUMNS_BF16, _COLUMNS_FP16 = (tl.constexpr(_in(dtype, _COLUMNS, False)) for dtype in ("bf16", "fp16"))
_HALVES_OPERANDS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 3))
_COLUMNS_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 10))


@triton.jit
def int4_halves(codes, zero, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """codes [R, BN] uint8 of a pack block, zero [BN] in 0 .. 15 -> its low and high half [R, BN], minus the zero.

    Exact in DTYPE; fp32 in the interpreter, which has no inline assembly.
    """
    if INTERPRETED or tl.float32 == DTYPE:
        offset = zero.to(tl.float32)[None, :]
        low, high = (codes & 15).to(tl.float32) - offset, (codes >> 4).to(tl.float32) - offset
    elif tl.bfloat16 == DTYPE:
        offset = (zero.to(tl.uint16) | 0xC300).to(tl.bfloat16, bitcast=True)[None, :]
        low, high = tl.inline_asm_elementwise(
            _HALVES_BF16,
            _HALVES_OPERANDS,
            [codes, tl.broadcast_to(offset, codes.shape)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        offset = (zero.to(tl.uint16) | 0xE400).to(tl.float16, bitcast=True)[None, :]
        low, high = tl.inline_asm_elementwise(
            _HALVES_FP16,
            _HALVES_OPERANDS,
            [codes, tl.broadcast_to(offset, codes.shape)],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _plain_column(words, at: tl.constexpr, zeros):
    """Low halves of the words' byte `at`, minus their zeros, in fp32."""
    return ((words >> (8 * at)) & 15).to(tl.float32) - ((zeros >> (8 * at)) & 15).to(tl.float32)[None, :]


@triton.jit
def _offset(words, at: tl.constexpr, zeros, BASE: tl.constexpr):
    """-(base + zero) of the words' byte `at`, twice in a word."""
    half = ((zeros >> (8 * at)) & 15) | BASE
    return tl.broadcast_to((half | (half << 16))[None, :], words.shape)


@triton.jit
def int4_columns(words, zeros, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """words [R, W] int32, the codes of four neighbouring outputs; zeros [W] int32, their zeros.

    -> the low halves of outputs 4w, 4w + 1, 4w + 2, 4w + 3, then the high ones: eight [R, W], as of `int4_halves`.
    Words are what a thread reads from shared memory in the order of a tensor core's operand; bytes would be four reads.
    """
    if INTERPRETED or tl.float32 == DTYPE:
        low0, low1 = _plain_column(words, 0, zeros), _plain_column(words, 1, zeros)
        low2, low3 = _plain_column(words, 2, zeros), _plain_column(words, 3, zeros)
        high0, high1 = _plain_column(words >> 4, 0, zeros), _plain_column(words >> 4, 1, zeros)
        high2, high3 = _plain_column(words >> 4, 2, zeros), _plain_column(words >> 4, 3, zeros)
    elif tl.bfloat16 == DTYPE:
        low0, low1, low2, low3, high0, high1, high2, high3 = tl.inline_asm_elementwise(
            _COLUMNS_BF16,
            _COLUMNS_OPERANDS,
            [
                words,
                _offset(words, 0, zeros, 0xC300),
                _offset(words, 1, zeros, 0xC300),
                _offset(words, 2, zeros, 0xC300),
                _offset(words, 3, zeros, 0xC300),
            ],
            dtype=(
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
            ),
            is_pure=True,
            pack=2,
        )
    else:
        low0, low1, low2, low3, high0, high1, high2, high3 = tl.inline_asm_elementwise(
            _COLUMNS_FP16,
            _COLUMNS_OPERANDS,
            [
                words,
                _offset(words, 0, zeros, 0xE400),
                _offset(words, 1, zeros, 0xE400),
                _offset(words, 2, zeros, 0xE400),
                _offset(words, 3, zeros, 0xE400),
            ],
            dtype=(
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
                tl.float16,
            ),
            is_pure=True,
            pack=2,
        )
    return low0, low1, low2, low3, high0, high1, high2, high3


@triton.jit
def woven(a0, a1, a2, a3):
    """Columns 4w, 4w + 1, 4w + 2, 4w + 3 of [M, W] tiles -> [M, 4 W]."""
    return tl.interleave(tl.interleave(a0, a2), tl.interleave(a1, a3))


@triton.jit
def store_tile(acc, out, bias, rows, cols, M, N):
    """out[rows, cols] = acc [BM, BN] fp32 + bias [N] or None, rounded once."""
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])
