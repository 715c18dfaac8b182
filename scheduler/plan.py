"""One step, as plain data: what the scheduler orders and what the runner answers.

    schedule() ──StepPlan──▶ runner.launch() ─ ─ ─▶ runner.collect() ──StepResult──▶ update()

Another step may be planned and launched in between. Everything here could cross a process boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .drafts import DraftOrder
from .params import SamplingParams


class NewSeq(NamedTuple):
    """A sequence that enters a slot: first admission, or return after preemption (then with its output so far)."""

    slot: int
    token_ids: tuple[int, ...]  # prompt, then what was drawn before a preemption
    num_prompt: int
    params: SamplingParams
    sample_index: int  # which of the request's n samples
    block_ids: tuple[int, ...]
    salt: str = ""  # what it shares with other requests it shares only with those of this salt


class Row(NamedTuple):
    """One sequence's share of a step: the tokens at positions start .. start + num_tokens - 1.

    With a draft, num_tokens is 1 + draft.shape.nodes: the last real token and room for what is guessed behind it.
    keeps: the last token's logits are kept under this key, for the plan's later `draws`.
    """

    slot: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...] = ()
    draft: DraftOrder | None = None
    samples: bool = True  # the row reaches the end of what is known, so a next token is drawn
    keeps: int | None = None


class Draw(NamedTuple):
    """A sequence whose next token is drawn from kept logits: a further sample of a prompt that has been computed.

    It may have a row in the same plan, which computes that token.
    """

    slot: int
    kept: int


@dataclass(slots=True)
class StepPlan:
    """The runner does, in this order: forget `forgotten` logits, clear `freed` slots, fill `new` ones, copy blocks,
    draw `draws`, run `rows`.
    """

    step_id: int
    new: list[NewSeq] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source block, destination block), copy on write
    draws: list[Draw] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)  # keys of kept logits that no draw will need

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class TokenLogprob(NamedTuple):
    """A token's natural log-probability by the model's own logits (before temperature, penalties and filters)."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most likely
    # (token id, logprob): its best rivals, most likely first, then those that were asked for by id
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class RowResult:
    """What one row gave; `error` ends this request and no other."""

    token_ids: list[int] = field(default_factory=list)  # drawn or accepted, in order; empty if the row only computed
    logprobs: list[TokenLogprob] | None = None  # beside token_ids, when asked for
    prompt_logprobs: list[TokenLogprob] | None = None  # for the prompt tokens at start + 1 .. start + num_tokens
    error: str | None = None
    unsound: bool = False  # of an error: K/V that the row wrote or read gave no numbers
    drafted: int = 0  # nodes that were verified; all tokens but the last of token_ids were among them
    draft_depth: int = 0  # levels that they had
    draft_error: str | None = None  # why nothing was guessed for a row with a draft: its proposer failed


class DraftPass(NamedTuple):
    """What guessing took in one step."""

    method: str
    levels: int  # passes of the proposer, one after another
    rows: int  # of all of them
    seconds: float
    caught_up: int = 0  # of the rows, those of tokens before the last that its cache did not have


@dataclass(slots=True)
class StepResult:
    step_id: int
    rows: list[RowResult]  # beside StepPlan.rows
    draws: list[RowResult] = field(default_factory=list)  # beside StepPlan.draws
    drafting: list[DraftPass] = field(default_factory=list)


@dataclass(slots=True)
class Chunk:
    """News of one sample of one request: tokens drawn in a step, and its end if it ended.

    finish_reason    None = goes on; "stop", "length", "repetition", "abort", "error", "expired"
    stop_reason      the stop token id that matched; None for EOS
    prompt_logprobs  with sample 0, in pieces as the prompt is computed, in order; the first prompt token has none
    num_cached       prompt tokens that came from the prefix cache; -1 except in a sample's first chunk
    queued_seconds   from the request's arrival to the first step it was in; -1 except in a sample's first chunk
    num_drafted      tokens guessed for this sample and verified, since the chunk before
    num_accepted     of these, those among its tokens
    error            why finish_reason is "error"; of "expired" which promise it was: "timeout" or "deadline" (it has
                     passed), "unreachable" (the deadline cannot be met any more, so the work was not begun)
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    num_cached: int = -1
    error: str | None = None
    queued_seconds: float = -1.0
    num_drafted: int = 0
    num_accepted: int = 0
