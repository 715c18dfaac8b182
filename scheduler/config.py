"""What a scheduler is told at its start, and what it counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .policy import POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """slo_itl in seconds; the rest as in `engine.config.EngineConfig`."""

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
    discarded: int = 0  # tokens drawn for samples that had ended while the step was out: one each at most
    failed: int = 0
