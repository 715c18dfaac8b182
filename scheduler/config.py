"""What a scheduler is told at its start, and what it counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .drafts import DraftShape
from .policy import POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """slo_itl in seconds; the rest as in `engine.config.EngineConfig`.

    draft_method    how tokens are guessed, unless a request wishes otherwise; "none" = nothing is, for anybody
    draft_shape     how many of them at most
    adaptive_drafts whether each step decides how many it pays to guess, or takes all that there is room for
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_prefill_tokens: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    prefix_caching: bool = True
    cache_context: tuple[str, ...] = ()  # what else K/V depends on: model, KV format, RoPE
    policy: str = "fcfs"
    tenant_weights: dict[str, float] = field(default_factory=dict)
    overtaking: float = 200.0
    slo_itl: float | None = None
    chunking: str = "tokens"
    eviction: str = "lru"
    draft_method: str = "none"
    draft_shape: DraftShape | None = None
    adaptive_drafts: bool = True

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens} and max_num_seqs {self.max_num_seqs}: "
                "a step must hold one token of every sequence; raise the first or lower the second"
            )
        if self.max_num_prefill_tokens is not None and self.max_num_prefill_tokens < 1:
            raise ValueError(f"max_num_prefill_tokens is {self.max_num_prefill_tokens}: at least 1 is needed")
        capacity = (self.num_blocks - 1) * self.block_size
        if self.max_model_len > capacity:
            raise ValueError(
                f"max_model_len is {self.max_model_len}, but the KV cache holds {capacity} tokens: "
                "lower max_model_len or give the cache more memory"
            )
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}: choose one of {', '.join(POLICIES)}")
        if self.chunking not in ("tokens", "time"):
            raise ValueError(f"chunking is {self.chunking!r}: choose tokens or time")
        if not 0 <= self.overtaking < math.inf:
            raise ValueError(f"overtaking is {self.overtaking}: it must be a number, and at least 0")
        if self.slo_itl is not None and not self.slo_itl > 0:
            raise ValueError(f"slo_itl is {self.slo_itl} seconds: it must be above 0")
        if (self.draft_method == "none") != (self.draft_shape is None):
            raise ValueError(
                f"draft_method is {self.draft_method!r} and draft_shape {self.draft_shape}: "
                'give both, or "none" and no shape'
            )
        if self.draft_shape is not None and self.draft_shape.nodes >= self.max_num_batched_tokens:
            raise ValueError(
                f"draft_shape is {self.draft_shape} with {self.draft_shape.nodes} nodes, and max_num_batched_tokens "
                f"{self.max_num_batched_tokens}: a step must hold them and one token more; guess fewer or raise it"
            )
        for tenant, weight in self.tenant_weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"tenant_weights[{tenant!r}] is {weight}: it must be a number above 0")


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    aborted: int = 0
    expired: int = 0
    discarded: int = 0  # tokens drawn for samples that had ended while the step was out
    failed: int = 0
    drafted: int = 0  # tokens that were guessed and verified
    accepted: int = 0  # of these, those that were given out
    draft_failures: int = 0  # samples for which guessing failed: they went on without
    drafted_at: list[int] = field(default_factory=list)  # by level: how often something was guessed there
    accepted_at: list[int] = field(default_factory=list)  # by level: how often it was right down to there
    depths: list[int] = field(default_factory=list)  # how often 0, 1, 2, … levels were decided on for a stream

    @property
    def wasted(self) -> int:
        """Tokens that were verified in vain."""
        return self.drafted - self.accepted
