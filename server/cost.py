"""What a request will cost the engine, in seconds, from what is known before it is tokenized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..engine.messages import EngineReady, StepStats
from ..scheduler.step_time import StepCost, ideal_seconds

FADE = 0.99  # of a running mean's past per observation: it looks back on about a hundred
MAX_TEXT_TOKENS = 256.0  # that the text of one call counts for: a paragraph tells as much as a book of an odd language

# Engine time beside that of the same request without, on the bundled model of 8 M parameters and 4,096 tokens: drawn
# tokens pass through a sort of the vocabulary as well (1.2 with 5 rivals, 1.3 to 1.5 with 20), prompt tokens through
# the logits' matrix and the sort, where otherwise only the last one does (2.0 to 3.0 with 5).
LOGPROB_WEIGHT = 1.4
PROMPT_LOGPROB_WEIGHT = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The size of a request as its fields give it.

    prompts          how many, each with the same number of samples
    samples          of all prompts together
    prompt_ids       prompt tokens that came as ids
    prompt_bytes     of the prompts that came as text, UTF-8
    shared_bytes     of each prompt's, those that all of them begin with: they are computed once
    longest_prompt   tokens of a prompt at most, since what is beyond is cut off; None = as many as the context holds
    max_tokens       of a sample; None = as many as the context holds
    logprobs         of the drawn tokens are wanted
    prompt_logprobs  of the prompts' own tokens are wanted
    """

    prompts: int = 1
    samples: int = 1
    prompt_ids: int = 0
    prompt_bytes: int = 0
    shared_bytes: int = 0
    longest_prompt: int | None = None
    max_tokens: int | None = None
    logprobs: bool = False
    prompt_logprobs: bool = False


class Encoded(NamedTuple):
    """Text that was made into tokens, before anything was cut from it."""

    num_bytes: int = 0
    num_tokens: int = 0


class RunningMean:
    """Of a ratio whose parts are observed together, such as bytes per token; what is long past fades."""

    def __init__(self, expected: float) -> None:
        """`expected` counts as one observation of weight 1."""
        self._amount, self._weight = expected, 1.0

    @property
    def value(self) -> float:
        return self._amount / self._weight

    def observe(self, amount: float, weight: float = 1.0) -> None:
        """`amount` of something for `weight` of something else."""
        if weight > 0:
            self._amount = FADE * self._amount + amount
            self._weight = FADE * self._weight + weight


class Cost(NamedTuple):
    """Seconds of the engine's time.

    prompts  to compute the prompts: whoever comes later waits for it
    samples  to draw the samples, in full batches: whoever comes later waits for those that find no free place
    """

    prompts: float = 0.0
    samples: float = 0.0

    @property
    def total(self) -> float:
        return self.prompts + self.samples


def tokens_per_prompt(asked: Asked, bytes_per_token: float) -> float:
    """Of a prompt on average, as far as its fields tell."""
    tokens = (asked.prompt_ids + asked.prompt_bytes / bytes_per_token) / asked.prompts
    return tokens if asked.longest_prompt is None else min(tokens, asked.longest_prompt)


def cost_seconds(
    asked: Asked, step: StepCost, *, bytes_per_token: float, tokens_per_sample: float, max_num_seqs: int
) -> Cost:
    """What the request takes of the engine: its rows of the steps, and its share of what a step costs anyway, which a
    prompt pays once and each drawn token to a `max_num_seqs`-th.

    A sample is expected to draw `tokens_per_sample`, and never more than max_tokens.
    """
    prompt = tokens_per_prompt(asked, bytes_per_token)
    shared = min(asked.shared_bytes / bytes_per_token, prompt)
    drawn = tokens_per_sample if asked.max_tokens is None else min(asked.max_tokens, tokens_per_sample)
    own = asked.prompts * step.work_seconds(round(shared), round(prompt - shared))
    work = (step.work_seconds(0, round(shared)) + own) * (PROMPT_LOGPROB_WEIGHT if asked.prompt_logprobs else 1.0)
    row = (step.base / max_num_seqs + step.per_tile / step.tile) * (LOGPROB_WEIGHT if asked.logprobs else 1.0)
    sample = drawn * (row + step.per_context * (prompt + drawn / 2))
    return Cost(asked.prompts * step.base + work, asked.samples * sample)


class Experience:
    """What steps have cost and requests have been like so far: from this the next one is judged."""

    def __init__(self, ready: EngineReady) -> None:
        self._step = _step_cost(ready.step_cost)
        self._max_num_seqs = ready.max_num_seqs
        self._max_tokens_per_step = ready.max_num_batched_tokens
        self._max_model_len = ready.max_model_len
        self._bytes_per_token = RunningMean(4.0)  # of English text; the first prompts replace it
        self._tokens_per_sample = RunningMean(256.0)  # a paragraph; the first answers replace it

    def saw_step(self, stats: StepStats) -> None:
        self._step = _step_cost(stats.step_cost) or self._step

    def saw_text(self, encoded: Encoded) -> None:
        """What the text of one call came to. It counts for its tokens up to MAX_TEXT_TOKENS, or a single long one would
        say what everybody's prompts are made of.
        """
        share = min(1.0, MAX_TEXT_TOKENS / max(encoded.num_tokens, 1))
        self._bytes_per_token.observe(share * encoded.num_bytes, share * encoded.num_tokens)

    def saw_samples(self, num_tokens: float) -> None:
        """The samples of one call that ended where they would have so many tokens on average; the call counts once,
        however many they were.
        """
        self._tokens_per_sample.observe(num_tokens)

    def cost(self, asked: Asked) -> Cost:
        """Nothing where the engine has no step-time model."""
        if self._step is None:
            return Cost()
        return cost_seconds(
            self._within_context(asked),
            self._step,
            bytes_per_token=self._bytes_per_token.value,
            tokens_per_sample=min(self._tokens_per_sample.value, self._max_model_len),
            max_num_seqs=self._max_num_seqs,
        )

    def prompt_tokens(self, asked: Asked) -> float:
        """Of all prompts; of those that came as text, by what tokens have been long."""
        return asked.prompts * tokens_per_prompt(self._within_context(asked), self._bytes_per_token.value)

    def most_tokens(self, asked: Asked) -> int:
        """What a quota is charged in advance: the prompts, and `max_tokens` of every sample. Where that was left out,
        what samples usually draw: the whole context would shut out whoever has not thought of it.
        """
        drawn = self._tokens_per_sample.value if asked.max_tokens is None else float(asked.max_tokens)
        return math.ceil(self.prompt_tokens(asked) + asked.samples * min(max(drawn, 0.0), self._max_model_len))

    def _within_context(self, asked: Asked) -> Asked:
        """A longer prompt is cut or refused."""
        longest = self._max_model_len if asked.longest_prompt is None else asked.longest_prompt
        return replace(asked, longest_prompt=min(longest, self._max_model_len))

    def ideal_seconds(self, prompt_tokens: int, output_tokens: int) -> float:
        """Of a sample that has the engine for itself and an empty cache; 0 where the engine has no step-time model."""
        if self._step is None:
            return 0.0
        return ideal_seconds(self._step, prompt_tokens, output_tokens, self._max_tokens_per_step)


def _step_cost(values: Sequence[float]) -> StepCost | None:
    """From the wire, where all fields are floats; None where there is no model."""
    return StepCost(int(values[0]), *values[1:]) if values else None
