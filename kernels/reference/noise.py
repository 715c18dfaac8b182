"""Randomness as a function: the same (seed, sample, position, purpose, column) gives the same noise everywhere.

    key     = mix(seed)                                    64 bits
    counter = (column / 4, position, sample index, purpose)
    Philox-4x32-10(counter, key) = the words of columns 4c, 4c + 1, 4c + 2, 4c + 3

Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. There is no state, so nothing depends on
batch-mates, on how a prompt was chunked, on preemption or on restarts. The words are exact integers on every device;
uniforms too; Gumbel noise goes through log and may differ between devices in the last bit.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key's words advance by between rounds
_ROUNDS = 10
_BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 under 1


class Purpose(IntEnum):
    """What noise is drawn for. Two purposes never share a word, so draft and target stay independent."""

    SAMPLE = 0  # the token drawn at a position
    DRAFT = 1  # a proposer's guesses; row i of a tree (0 = the root) has the columns i * V .. i * V + V - 1
    ACCEPT = 2  # verification: column = how many siblings were tried before
    BONUS = 3  # the token that ends a verification


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox-4x32 on words in [0, 2**32): int64 tensors, uint64 arrays or ints, that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product may wrap into int64's sign: both halves are still exact once masked.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((right >> 32) ^ (c1 ^ k0)) & _WORD
        c2 = ((left >> 32) ^ (c3 ^ k1)) & _WORD
        c1 = right & _WORD
        c3 = left & _WORD
        k0 = (k0 + _WEYL[0]) & _WORD
        k1 = (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def mix(seeds: Tensor) -> Tensor:
    """A bijection of int64 that spreads near-by seeds apart (the finaliser of SplitMix64, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        seeds = (seeds ^ _shift_right(seeds, shift)) * (factor - 2**64)
    return seeds ^ _shift_right(seeds, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """The logical shift, which int64's own >> is not for negative values."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def philox_key(seeds: Tensor) -> tuple[Tensor, Tensor]:
    """The two key words of each seed [L]."""
    mixed = mix(seeds)
    return mixed & _WORD, _shift_right(mixed, 32)


def words(seeds: Tensor, sample_index: Tensor, positions: Tensor, purpose: Purpose, columns: int | Tensor) -> Tensor:
    """32 random bits per row and column, as int64.

    seeds, sample_index, positions [L] int64 (a seed's 64 bits, two's complement)
    columns  V, for the columns 0 .. V - 1, or a tensor [L, C] of column numbers
    Returns [L, V] or [L, C].
    """
    k0, k1 = philox_key(seeds)
    key = (k0[:, None], k1[:, None])
    rest = (positions[:, None], sample_index[:, None], torch.full_like(positions, int(purpose))[:, None])
    if isinstance(columns, int):
        groups = torch.arange((columns + 3) // 4, device=seeds.device)[None]
        return torch.stack(philox4x32((groups, *rest), key), dim=-1).flatten(1)[:, :columns]
    drawn = torch.stack(philox4x32((columns >> 2, *rest), key), dim=-1)
    return drawn.gather(-1, (columns & 3)[..., None]).squeeze(-1)


def uniform(seeds: Tensor, sample_index: Tensor, positions: Tensor, purpose: Purpose, columns: int | Tensor) -> Tensor:
    """Uniform noise in (0, 1), float32, never 0 and never 1; shapes as in `words`."""
    return to_uniform(words(seeds, sample_index, positions, purpose, columns).to(torch.float32))


def gumbel(seeds: Tensor, sample_index: Tensor, positions: Tensor, purpose: Purpose, columns: int | Tensor) -> Tensor:
    """Standard Gumbel noise, float32: argmax(log p + gumbel) is a draw from p. Shapes as in `words`."""
    return to_gumbel(words(seeds, sample_index, positions, purpose, columns).to(torch.float32))


def to_uniform(drawn: Tensor) -> Tensor:
    """Words, rounded to float32, to (0, 1), in place."""
    return drawn.add_(0.5).mul_(2.0**-32).clamp_(max=_BELOW_ONE)


def to_gumbel(drawn: Tensor) -> Tensor:
    """Words, rounded to float32, to Gumbel noise in [-2.9, 22.9], in place.

    Taken as -log(-log(1 - u)): what wins an argmax has its exponential -log(1 - u) near 0, and there u keeps its full
    relative precision. -log(-log(u)) would have to tell values just under 1 apart, and rare tokens would round away.
    """
    return to_uniform(drawn).neg_().log1p_().neg_().log_().neg_()
