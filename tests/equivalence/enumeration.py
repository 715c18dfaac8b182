"""What sampled tokens should be: distributions by a naive reading of the parameters, and whether counts agree."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from scipy import stats

from quire.scheduler.params import SamplingParams


def next_token(
    logits: Sequence[float], p: SamplingParams, prompt: tuple[int, ...], drawn: tuple[int, ...], eos: Collection[int]
) -> list[float]:
    """The distribution of the token behind prompt and `drawn`, read off the parameters one by one."""
    x, known, vocabulary = list(logits), (*prompt, *drawn), range(len(logits))
    for t in set(known):
        x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
    for t in set(drawn):
        x[t] -= p.presence_penalty + p.frequency_penalty * drawn.count(t)
    for t, bias in p.logit_bias.items():
        x[t] += bias
    for word in p.bad_words:
        if known[len(known) - len(word) + 1 :] == word[:-1]:
            x[word[-1]] = -math.inf
    if len(drawn) < p.min_tokens:
        for t in (*eos, *p.stop_token_ids):
            x[t] = -math.inf
    if p.allowed_token_ids is not None:
        x = [value if t in p.allowed_token_ids else -math.inf for t, value in enumerate(x)]
    order = sorted(vocabulary, key=lambda t: (-x[t], t))
    weight = [math.exp((x[t] - x[order[0]]) / p.temperature) for t in vocabulary]
    if p.top_k:
        weight = [w if t in order[: p.top_k] else 0.0 for t, w in enumerate(weight)]
    total, before, kept = sum(weight), 0.0, [0.0 for _ in vocabulary]
    for t in order:
        if before < p.top_p * total and weight[t] >= p.min_p * weight[order[0]]:
            kept[t] = weight[t]
        before += weight[t]
    return [w / sum(kept) for w in kept]


def fit(seen: np.ndarray, chances: np.ndarray) -> float:
    """The p-value of counts by cell under the hypothesis that they were drawn with these chances; rare cells are
    pooled, and a count where none can be is 0."""
    expected = chances * seen.sum()
    if seen[expected == 0].any():
        return 0.0
    rare = expected < 10
    expected, seen = np.append(expected[~rare], expected[rare].sum()), np.append(seen[~rare], seen[rare].sum())
    possible = expected > 0
    return float(stats.chisquare(seen[possible], expected[possible]).pvalue)
