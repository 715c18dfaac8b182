"""How other engines fill a step: disciplines to measure ours against, on the same memory, queue and runner.

    PrefillFirst   vLLM's original: whole prompts first, streams wait meanwhile
    DecodeFirst    Orca's iteration-level batching: streams go on, beside prompts that are taken in whole
    StaticBudget   Sarathi-Serve: streams go on, prompts in chunks within a constant number of tokens

All are first come, first served to the letter, as theirs are. Each is a Scheduler with another `_fill`, so that it can
be simulated, and can take the place of a live engine's scheduler.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..scheduler.budget import Budget
from ..scheduler.config import SchedulerConfig
from ..scheduler.plan import Row, StepPlan
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler
from ..scheduler.step_time import StepCost, StepShape


class _FirstCome(Scheduler):
    """What the three have in common; `_share` is how much of a prompt a step takes."""

    def __init__(self, config: SchedulerConfig, cost: StepCost) -> None:
        super().__init__(replace(config, policy="fcfs", overtaking=0.0), cost)

    def _share(self, remaining: int, tokens: int) -> int:
        """The whole prompt, or nothing of it."""
        return remaining if remaining <= tokens else 0

    def _decode(self, rows: dict[Request, Row]) -> bool:
        """A row for every running request that only lacks its next token; whether none had to be preempted for it."""
        preemptions = self.counters.preemptions
        for request in [request for request in self.running if request.remaining == 1]:
            if request.slot >= 0:  # not preempted meanwhile, for an earlier one
                self._grow(request, rows)
        return self.counters.preemptions == preemptions

    def _prompts(self, plan: StepPlan, rows: dict[Request, Row], tokens: int, now: float) -> None:
        """Rows for prompts in order of arrival, until one has no share of `tokens`, no slot or no memory."""
        budget = Budget(self.steps.cost, StepShape(), tokens, math.inf, self.config.block_size)
        admit = True
        for request in self._asking(budget, bool(self.residency.free_slots)):
            lacks = 0 if request.forks else request.remaining
            if lacks and not self._share(lacks, budget.tokens):
                break
            if request.slot < 0 and not self._enter(plan, request, now):
                admit = False
                break
            if request in self._drawing:
                self._go_on(request, budget)
            else:  # what the cache holds is known now
                row = rows[request] = self._row(request, self._share(request.remaining, budget.tokens), ())
                budget.spend(row.start, row.num_tokens)
        self._fork(plan, budget, now, admit=admit)
        self._put_back()


class PrefillFirst(_FirstCome):
    """A step is all the waiting prompts that `max_num_batched_tokens` takes whole, or else a token of every stream."""

    def __init__(self, config: SchedulerConfig, cost: StepCost) -> None:
        super().__init__(config, cost)
        _holds(config, config.max_model_len, "a whole prompt")

    def _fill(self, plan: StepPlan, rows: dict[Request, Row], now: float) -> None:
        self._prompts(plan, rows, self.config.max_num_batched_tokens, now)
        if not rows and not plan.draws:
            self._decode(rows)


class DecodeFirst(_FirstCome):
    """A step is a token of every stream, and all the waiting prompts that the rest of the tokens takes whole."""

    def __init__(self, config: SchedulerConfig, cost: StepCost) -> None:
        super().__init__(config, cost)
        _holds(config, config.max_model_len + config.max_num_seqs, "a whole prompt beside every stream")

    def _fill(self, plan: StepPlan, rows: dict[Request, Row], now: float) -> None:
        if self._decode(rows):
            self._prompts(plan, rows, self.config.max_num_batched_tokens - len(rows), now)


class StaticBudget(_FirstCome):
    """A step is a token of every stream, and chunks of prompts up to `max_num_batched_tokens` together."""

    def _share(self, remaining: int, tokens: int) -> int:
        return min(remaining, tokens)

    def _fill(self, plan: StepPlan, rows: dict[Request, Row], now: float) -> None:
        if self._decode(rows):
            self._prompts(plan, rows, self.config.max_num_batched_tokens - len(rows), now)


def _holds(config: SchedulerConfig, tokens: int, what: str) -> None:
    if config.max_num_batched_tokens < tokens:
        raise ValueError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens}: a step must hold {what}, {tokens} tokens; "
            "raise it, or lower max_model_len"
        )
