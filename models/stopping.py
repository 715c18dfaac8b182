"""What rules of stopping a draft are worth, in tokens per modelled second, on text that the target wrote.

Given a text X of the target, speculation that ended in X is drawn exactly: where the draft has followed X so far, X's
next token was an accepted guess with probability min(1, q / p), and else the guess was another token, drawn from
(q - p)+, behind which the draft went on alone. So each place needs one draw of "rejected" and one tail of guesses, and
every rule can then be played over the same draws.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .acceptance import features
from .continuations import Batch, Cache, distributions, draw, empty_cache, forward_cached, next_logits, tempered
from .llama import Layer, Llama, rotate

LONGEST = 12  # drafts of one round, at the most


class Trace(NamedTuple):
    """Of sequences [S] with C places each, which the target has written.

    temperatures  [S]
    rejected      [S, C] bool: a draft that has followed the text guesses wrong here
    text          [S, C, FEATURES] of the text's tokens, as drafted ones
    tails         [R, LONGEST, FEATURES] of a wrong guess and of what the draft went on with behind it, for each True of
                  `rejected` in row-major order
    """

    temperatures: Tensor
    rejected: Tensor
    text: Tensor
    tails: Tensor

    def at(self, temperature: float) -> "Trace":
        """Its sequences of this temperature."""
        rows = self.temperatures == temperature
        tails = self.tails[rows[self.rejected.nonzero()[:, 0]]]
        return Trace(self.temperatures[rows], self.rejected[rows], self.text[rows], tails)


@torch.no_grad()
def trace(target: Llama, draft: Llama, width: int, batch: Batch, generator: torch.Generator) -> Trace:
    first = batch.num_prompt
    parts: list[Trace] = []
    for tokens, temperatures, p in distributions(target, batch):
        cache = empty_cache(draft, *tokens.shape)
        logits = next_logits(draft, forward_cached(draft, tokens, 0, cache, width)[:, first - 1 : -1])
        q = tempered(logits, temperatures)
        written = tokens[:, first:]
        chances = (x.gather(-1, written[..., None])[..., 0] for x in (q, p))
        rejected = torch.rand(written.shape, generator=generator) >= torch.div(*chances)
        tails = []
        for i, places in enumerate(rejected):
            wrong = draw((q[i, places] - p[i, places]).clamp(min=0), generator)
            own = [(keys[i], values[i]) for keys, values in cache]
            positions = first + places.nonzero()[:, 0]
            tails.append(
                _tails(draft, width, wrong, logits[i, places], positions, own, temperatures[i : i + 1], generator)
            )
        text = features(logits, written, temperatures[:, None])
        parts.append(Trace(temperatures, rejected, text, torch.cat(tails)))
    return Trace(*map(torch.cat, zip(*parts, strict=True)))


def _tails(
    draft: Llama,
    width: int,
    tokens: Tensor,
    logits: Tensor,
    positions: Tensor,
    text: Cache,
    temperature: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """[R, LONGEST, FEATURES] of tokens [R], each in the place of the text's, drawn by logits [R, V], and of what
    follows."""
    own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in draft.layers]
    before = torch.arange(len(text[0][0][0])) < positions[:, None]
    known = [features(logits, tokens, temperature)]
    for i in range(LONGEST - 1):
        cos, sin = draft.cos[positions + i, None, None], draft.sin[positions + i, None, None]
        x = draft.embed_tokens(tokens)
        for layer, (keys, values), tail in zip(draft.layers, text, own, strict=True):
            x = x + _attend(layer, layer.input_layernorm(x), cos, sin, keys, values, before, tail)
            x = x + layer.mlp(layer.post_attention_layernorm(x), width)
        logits = next_logits(draft, draft.norm(x))
        tokens = draw(tempered(logits[None], temperature)[0], generator)
        known.append(features(logits, tokens, temperature))
    return torch.stack(known, 1)


def _attend(
    layer: Layer,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    before: Tensor,
    tail: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Row r of x [R, d] sees the text's keys [kv_heads, L, head_dim] where before [R, L], and its own tail.

    Its own key and value [R, kv_heads, 1, head_dim] are added to the tail.
    """
    a = layer.self_attn
    repeats = a.heads // a.kv_heads

    def heads(y: Tensor) -> Tensor:
        return y.view(len(x), y.shape[-1] // a.head_dim, 1, a.head_dim)

    q = rotate(heads(a.q_proj(x)), cos, sin).view(len(x), a.kv_heads, repeats, a.head_dim)
    tail.append((rotate(heads(a.k_proj(x)), cos, sin), heads(a.v_proj(x))))
    tail_keys, tail_values = (torch.cat(parts, 2) for parts in zip(*tail, strict=True))
    of_text = torch.einsum("rkgh,klh->rkgl", q, keys).float().masked_fill(~before[:, None, None], float("-inf"))
    of_tail = (q @ tail_keys.transpose(-1, -2)).float()
    weights = (torch.cat([of_text, of_tail], -1) * a.head_dim**-0.5).softmax(-1).to(x.dtype)
    by_text, by_tail = weights.split([of_text.shape[-1], len(tail)], -1)
    y = torch.einsum("rkgl,klh->rkgh", by_text, values) + by_tail @ tail_values
    return a.o_proj(y.reshape(len(x), a.heads * a.head_dim))


class Played(NamedTuple):
    """What a rule came to: passes of the target, drafted tokens, and tokens that were won."""

    rounds: int
    drafted: int
    tokens: int

    def rate(self, cost: float) -> float:
        """Tokens per second if the target's pass takes one second and a draft `cost`."""
        return self.tokens / (self.rounds + cost * self.drafted)


def play(
    rejected: list[list[bool]], text: list[list[float]], tails: list[list[float]], go_on: float, limit: int
) -> Played:
    """Speculate over the traces' texts: a round drafts one token, and another, up to `limit`, while the probability
    that all so far are accepted is at least `go_on`; 0 = all rounds are `limit` long.

    text [S][C] and tails [R][LONGEST] are probabilities of acceptance, known as soon as a token is drafted.
    """
    rounds = drafted = won = tail = 0
    for wrong, right in zip(rejected, text, strict=True):
        place, end = 0, len(wrong) - limit
        numbers = []  # of each place's tail, if it has one
        for is_wrong in wrong:
            numbers.append(tail)
            tail += is_wrong
        while place < end:
            stop = next((i for i in range(place, place + limit) if wrong[i]), place + limit)
            count, every = 0, 1.0
            while count < limit and every >= go_on:
                drawn = place + count
                every *= right[drawn] if drawn < stop else tails[numbers[stop]][drawn - stop]
                count += 1
            won += min(count, stop - place) + 1
            place += min(count, stop - place) + 1
            rounds += 1
            drafted += count
    return Played(rounds, drafted, won)
