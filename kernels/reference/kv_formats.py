"""The KV formats: plain floats, fp8 with static scales, int8 and rotated int4 with a scale per token and head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv_formats import KVFormat, register
from .hadamard import is_power_of_two

FP8_MAX = 448.0  # of e4m3
# Below this an entry of a scale is as good as zero; it is the smallest fp16 that is no subnormal.
LEAST_SCALE = 2.0**-14


def _plain(name: str, dtype: torch.dtype) -> None:
    register(
        KVFormat(
            name=name,
            storage=dtype,
            encode=lambda x, scale: (x.to(dtype), None),
            decode=lambda codes, scale: codes.float(),
        )
    )


for _name, _dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
    _plain(_name, _dtype)


def _encode_fp8(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scaled = x if scale is None else x / scale[..., None]
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), None


def _decode_fp8(codes: Tensor, scale: Tensor | None) -> Tensor:
    return codes.float() if scale is None else codes.float() * scale[..., None]


# 3 mantissa bits whatever the size: values are divided by the head's scale (1, or the checkpoint's), clamped to ±448.
register(KVFormat(name="fp8_e4m3", storage=torch.float8_e4m3fn, encode=_encode_fp8, decode=_decode_fp8, scale="static"))


def _token_scale(x: Tensor, levels: float) -> Tensor:
    """max |x| / levels as it will be stored, so that codes are made with the very scale that reads them."""
    return (x.abs().amax(-1) / levels).clamp(LEAST_SCALE, 65504.0).half()


def _encode_int8(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scale = _token_scale(x, 127)
    return (x / scale[..., None].float()).round().clamp(-127, 127).to(torch.int8), scale


def _decode_int8(codes: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        raise ValueError("int8 keys and values have a scale per token")
    return codes.float() * scale[..., None].float()


# To nearest even, s = max |x| / 127.
register(
    KVFormat(name="int8_per_token_head", storage=torch.int8, encode=_encode_int8, decode=_decode_int8, scale="token")
)


def _encode_int4(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scale = _token_scale(x, 7.5)
    codes = (x / scale[..., None].float() + 7.5).round().clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4), scale


def _decode_int4(codes: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        raise ValueError("int4 keys and values have a scale per token")
    nibbles = torch.cat((codes & 15, codes >> 4), dim=-1)
    return (nibbles.float() - 7.5) * scale[..., None].float()


# 16 levels at ±0.5, ±1.5 … ±7.5 times s = max |x| / 7.5: all are used and none is beyond the largest entry, which a
# grid with a zero in the middle cannot have. Byte i holds the entries i (low nibble) and i + D/2 (high).
register(
    KVFormat(
        name="int4_per_token_head",
        storage=torch.uint8,
        encode=_encode_int4,
        decode=_decode_int4,
        width=lambda head_dim: head_dim // 2,
        scale="token",
        rotates_keys=True,
        refuses=lambda head_dim: (
            None
            if is_power_of_two(head_dim)
            else f"its rotation needs a head_dim that is a power of two, the model's is {head_dim}; "
            "int8_per_token_head takes any"
        ),
    )
)
