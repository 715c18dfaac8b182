"""How long a request that came now would wait, from the step-time model: what an honest Retry-After says."""

from __future__ import annotations

from .step_time import StepCost, StepShape


def wait_seconds(
    cost: StepCost,
    decodes: StepShape,
    *,
    prefill_seconds: float,
    prefill_tokens: int,
    num_waiting: int,
    num_running: int,
    mean_output: float,
) -> float:
    """The longer of two queues, in seconds.

    For the budget: prefill_seconds of work wait, and a step beside `decodes` takes in prefill_tokens of it.
    For a slot: num_waiting stand before who comes now, and samples end at the rate that mean_output tokens at a step
    each give; half of one's output is still to come on average.
    """
    step = cost.seconds(decodes.plus(0, prefill_tokens))
    share = cost.work_seconds(0, prefill_tokens)
    for_budget = prefill_seconds * step / share if share else 0.0
    for_slot = 0.0
    if num_waiting >= 0 and num_running:
        for_slot = (num_waiting + 1) * step * max(1.0, mean_output) / num_running
    return max(for_budget, for_slot)
