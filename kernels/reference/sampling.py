"""From logits to tokens: penalties and masks, temperature, filters, the draw, and log-probabilities.

    logits ─ process_logits ─▶ edited ─ / temperature ─ top-k ─ top-p ─ min-p ─ + Gumbel noise ─ argmax ─▶ ids
       └──── token_logprobs ─▶ what the model itself thought, before any of that

Every row is computed by itself: no result depends on the other rows of the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..registry import op
from . import noise
from .noise import Purpose


class Penalties(NamedTuple):
    """N (row, column) pairs, each at most once: tokens that the row's sequence already holds."""

    rows: Tensor  # [N] int64
    columns: Tensor  # [N] int64
    repetition: Tensor  # [N] float32: divides a positive logit, multiplies a negative one
    subtracted: Tensor  # [N] float32: presence + frequency * count


class Bias(NamedTuple):
    """N (row, column) pairs, each at most once, and what is added to their logits."""

    rows: Tensor  # [N] int64
    columns: Tensor  # [N] int64
    values: Tensor  # [N] float32


class Marks(NamedTuple):
    """N (row, column) pairs."""

    rows: Tensor  # [N] int64
    columns: Tensor  # [N] int64


class Masks(NamedTuple):
    """Which columns of some rows stay, a bit for each: column c of row rows[i] is bit c % 32 of bits[i, c // 32]."""

    rows: Tensor  # [M] int64, distinct
    bits: Tensor  # [M, ceil(V / 32)] int32


class LogitEdits(NamedTuple):
    """Changes to logits [L, V]; None where no row asks for a kind."""

    penalties: Penalties | None = None
    bias: Bias | None = None
    banned: Marks | None = None  # set to -inf
    allowed: Marks | None = None  # a row named here keeps only its own columns
    masks: Masks | None = None  # likewise, of what is left


@op
def process_logits(logits: Tensor, edits: LogitEdits) -> Tensor:
    """Apply a step's edits to logits [L, V] float32; returns a new tensor.

    In this order: repetition penalty (Keskar et al. 2019, section 4.1), presence and frequency penalties, bias, bans,
    allow lists, masks. The sign test of the repetition penalty thus sees the model's own logit.
    """
    logits = logits.clone()
    if edits.penalties is not None:
        rows, columns, repetition, subtracted = edits.penalties
        x = logits[rows, columns]
        logits[rows, columns] = torch.where(x > 0, x / repetition, x * repetition) - subtracted
    if edits.bias is not None:
        rows, columns, values = edits.bias
        logits[rows, columns] += values
    if edits.banned is not None:
        logits[edits.banned.rows, edits.banned.columns] = -torch.inf
    if edits.allowed is not None:
        rows, columns = edits.allowed
        kept = logits[rows, columns]
        logits[rows.unique()] = -torch.inf
        logits[rows, columns] = kept
    if edits.masks is not None:
        rows, bits = edits.masks
        stays = (bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bits.device)) & 1
        logits[rows] = logits[rows].masked_fill(stays.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)
    return logits


def tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - their maximum) / temperature, for temperature [L] > 0; with 0 at the top no temperature overflows."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]


def filtered(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set to -inf what the filters remove from tempered logits x [L, V]; the most likely token always stays.

    In this order, each on the distribution that the one before left:
    top_k [L] int64    the k most likely; 0 = off
    top_p [L] float32  the smallest set of most likely tokens whose mass is at least p; 1 = off (Holtzman et al. 2020)
    min_p [L] float32  tokens at least min_p times as likely as the most likely; 0 = off (Nguyen et al. 2024)
    Of equally likely tokens the lower id counts as more likely.
    """
    rows = ((top_k > 0) | (top_p < 1) | (min_p > 0)).nonzero().squeeze(1)
    if rows.numel() == 0:
        return x
    top_k, top_p, min_p = top_k[rows, None], top_p[rows, None], min_p[rows, None]
    ranked, ids = x[rows].sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(x.shape[-1], device=x.device)
    keep = (rank < top_k) | (top_k <= 0)
    mass = ranked.masked_fill(~keep, -torch.inf).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    mass_before = pad(mass[:, :-1], (1, 0))
    # The sum of a whole distribution may reach 1 early by rounding: top_p = 1 must still keep everything.
    keep &= (mass_before < top_p) | (top_p >= 1)
    keep &= ranked >= min_p.log()
    keep[:, 0] = True
    x = x.clone()
    x[rows] = torch.empty_like(ranked).scatter_(-1, ids, ranked.masked_fill(~keep, -torch.inf))
    return x


@op
def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of logits [L, V], and its id, the lowest of equals: (values [L], ids [L] int64).

    A value that is not finite tells of a row that no token can be drawn from: NaN wins over every number.
    """
    values, ids = logits.max(dim=-1)
    return values, ids


@op
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    sample_index: Tensor,
    positions: Tensor,
) -> Tensor:
    """Draw one token per row: argmax(filtered(logits / temperature) + Gumbel noise).

    logits [L, V] float32, already processed
    temperature [L] float32: 0 = the plain argmax, the lowest id of equals
    top_k, top_p, min_p [L]: see `filtered`
    seeds, sample_index, positions [L] int64: where the noise comes from; a position is the drawn token's own
    Returns ids [L] int64. A row whose largest logit is not finite has no distribution: its id is any of the vocabulary.
    """
    ids = logits.max(dim=-1).indices
    rows = (temperature > 0).nonzero().squeeze(1)
    if rows.numel() > 0:
        x = filtered(tempered(logits[rows], temperature[rows]), top_k[rows], top_p[rows], min_p[rows])
        g = noise.gumbel(seeds[rows], sample_index[rows], positions[rows], Purpose.SAMPLE, x.shape[-1])
        ids[rows] = (x + g).max(dim=-1).indices
    return ids


@op
def probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The distribution that `sample` draws from, [L, V] float32: at temperature 0 all mass lies on the argmax."""
    greedy = torch.zeros_like(logits).scatter_(-1, logits.max(dim=-1, keepdim=True).indices, 1.0)
    warm = temperature > 0
    x = tempered(logits, torch.where(warm, temperature, 1.0))
    return torch.where(warm[:, None], filtered(x, top_k, top_p, min_p).softmax(dim=-1), greedy)


class Logprobs(NamedTuple):
    """Log-probabilities (natural) of n tokens and of their best rivals."""

    logprob: Tensor  # [n] float32
    rank: Tensor  # [n] int64: 1 + the number of strictly likelier tokens
    top_ids: Tensor  # [n, k] int64, most likely first, of equals the lower id first
    top_logprobs: Tensor  # [n, k] float32


@op
def token_logprobs(logits: Tensor, ids: Tensor, k: int) -> Logprobs:
    """log_softmax of the model's raw logits [n, V] float32 at ids [n], with the k most likely tokens beside it.

    One array feeds both, so `logprob == top_logprobs[0]` is an exact test for "this token is a greedy choice".
    """
    table = logits.log_softmax(dim=-1)
    logprob = table.gather(-1, ids[:, None])
    values, order = table.sort(dim=-1, descending=True, stable=True)
    return Logprobs(logprob.squeeze(1), 1 + (table > logprob).sum(dim=-1), order[:, :k], values[:, :k])
