"""Rotary position embedding (Su et al. 2021, equation 34) and its tables for stretched contexts.

A table is [positions, rotary_dim] fp32: cos of the rotary_dim / 2 angles, then sin, both times the attention factor.
It is computed once, so that a key's rotation never depends on how long its sequence has become.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..batch import LayerKV
from ..registry import op
from .kv import kv_write

STRETCHED = ("dynamic", "yarn", "llama3", "longrope")  # the scalings that know the length a model was trained on


@op
def rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rotate the first rotary_dim of D columns of every head by its position's angles, in fp32.

    q [T, Hq, D], k [T, Hk, D], positions [T], table [P, rotary_dim] -> (q, k); may work in place.
    Angle i turns the columns (i, i + rotary_dim / 2), or (2i, 2i + 1) if interleaved (GPT-J, GLM).
    """
    cos, sin = table[positions.long(), None].chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


@op
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    interleaved: bool,
    cache: LayerKV,
    slot_mapping: Tensor,
) -> Tensor:
    """`rope` of q and k, then `kv_write` of the rotated k and of v: the rotated q."""
    q, k = rope(q, k, positions, table, interleaved)
    kv_write(k, v, cache, slot_mapping)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary_dim = 2 * cos.shape[-1]
    turned = x[..., :rotary_dim].float()
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def rope_table(
    rotary_dim: int,
    max_positions: int,
    base: float,
    scaling: Mapping[str, Any] | None = None,
    trained_positions: int | None = None,
) -> Tensor:
    """cos and sin for the positions 0 .. max_positions - 1: [max_positions, rotary_dim] fp32.

    scaling            a checkpoint's rope parameters ("rope_type" or the older "type", "factor", ...), None = plain
    trained_positions  the checkpoint's max_position_embeddings; needed by "dynamic", and where scaling lacks
                       "original_max_position_embeddings" or "factor"

    Scalings that look at the length of a sequence (dynamic, longrope) are evaluated for max_positions.
    ValueError for an unknown rope_type or a parameter that is missing.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be positive and even")
    inverse_frequencies, attention_factor = _frequencies(rotary_dim, max_positions, base, scaling, trained_positions)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor


def _frequencies(
    rotary_dim: int, max_positions: int, base: float, scaling: Mapping[str, Any] | None, trained_positions: int | None
) -> tuple[Tensor, float]:
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
    if scaling is None or kind == "default":
        return _plain(rotary_dim, base), 1.0
    if kind == "linear":  # position interpolation (Chen et al. 2023)
        return _plain(rotary_dim, base) / _need(scaling, "factor"), 1.0
    if kind not in STRETCHED:
        raise ValueError(f"rope_type {kind!r} is not known; supported are default, linear, {', '.join(STRETCHED)}")
    trained = scaling.get("original_max_position_embeddings") or trained_positions
    if trained is None:
        raise ValueError(
            f"rope scaling {kind!r} needs original_max_position_embeddings or the model's max_position_embeddings"
        )
    if kind == "dynamic":
        return _plain(
            rotary_dim, _ntk_base(rotary_dim, base, scaling, trained_positions or trained, max_positions)
        ), 1.0
    if kind == "yarn":
        return _yarn(rotary_dim, base, scaling, trained, trained_positions)
    if kind == "llama3":
        return _llama3(rotary_dim, base, scaling, trained), 1.0
    return _longrope(rotary_dim, base, scaling, trained, trained_positions, max_positions)


def _need(scaling: Mapping[str, Any], name: str) -> Any:
    value = scaling.get(name)
    if value is None:
        raise ValueError(f"rope scaling {dict(scaling)} lacks {name!r}")
    return value


def _plain(rotary_dim: int, base: float) -> Tensor:
    return 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def _ntk_base(rotary_dim: int, base: float, scaling: Mapping[str, Any], trained: int, length: int) -> float:
    """Dynamic NTK: the base grows so that the slowest angle stretches with the length and the fastest stays."""
    factor = _need(scaling, "factor")
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return base * stretch ** (rotary_dim / (rotary_dim - 2))


def _stretch(scaling: Mapping[str, Any], trained: int, extended: int | None) -> float:
    factor = scaling.get("factor")
    if factor is None and extended is not None:
        factor = extended / trained
    return _need(scaling, "factor") if factor is None else factor


def _yarn(
    rotary_dim: int, base: float, scaling: Mapping[str, Any], trained: int, extended: int | None
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, section 3.2): fast angles stay, slow ones are interpolated, a ramp between them."""
    factor = _stretch(scaling, trained, extended)
    plain = _plain(rotary_dim, base)

    def column(turns: float) -> float:  # the angle that makes so many turns over the trained context
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = column(scaling.get("beta_fast") or 32), column(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high = high if high != low else low + 0.001  # a ramp needs some width
    interpolated = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = plain / factor * interpolated + plain * (1 - interpolated)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = temperature(mscale) / temperature(mscale_all_dim)
        else:
            attention_factor = temperature(1.0)
    return frequencies, float(attention_factor)


def _llama3(rotary_dim: int, base: float, scaling: Mapping[str, Any], trained: int) -> Tensor:
    """Llama 3.1: wavelengths beyond the trained context are stretched, short ones stay, linear between."""
    factor, low, high = (_need(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    plain = _plain(rotary_dim, base)
    turns = trained * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - kept) + plain * kept


def _longrope(
    rotary_dim: int, base: float, scaling: Mapping[str, Any], trained: int, extended: int | None, length: int
) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024; Phi-3): a divisor per angle, one list up to the trained length, one beyond it."""
    name = "long_factor" if length > trained else "short_factor"
    divisors = torch.tensor(_need(scaling, name), dtype=torch.float32)
    if divisors.shape != (rotary_dim // 2,):
        raise ValueError(
            f"rope scaling {name} has {divisors.numel()} entries, half of rotary_dim {rotary_dim} is needed"
        )
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        factor = _stretch(scaling, trained, extended)
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return _plain(rotary_dim, base) / divisors, float(attention_factor)
