"""What goes wrong while tokens are guessed, or behind a guess, ends no request that would have ended well without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from equivalence.paths import engine

from quire.engine.core import EngineCore
from quire.engine.messages import AddRequest
from quire.engine.sampler import NO_TOKEN_LEFT
from quire.scheduler.params import SamplingParams

# Behind 3 comes 5 and behind 5 comes 3, but nothing may come behind 5 3 5.
DEAD_END = SamplingParams(
    max_tokens=12, temperature=0.0, allowed_token_ids=(3, 5), bad_words=((3, 3), (5, 5), (5, 3, 5, 3)), logprobs=0
)


def answer(core: EngineCore, request: AddRequest) -> tuple[list[int], str | None, str | None]:
    """Tokens, finish reason and error."""
    chunks = core.handle(request)
    while core.has_work:
        chunks += core.step()
    for chunk in chunks:
        assert len(chunk.logprobs or ()) == len(chunk.token_ids)
    return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].finish_reason, chunks[-1].error


PROMPT = [5, 3, 5, 9, 1, 5]


@pytest.mark.parametrize(("stop_token_ids", "reason"), [((), "error"), ((5,), "stop")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["none", "ngram", "layers"])
def test_a_fault_behind_guesses_is_met_where_it_would_be_without_them(
    tiny_model: Path, method, temperature, stop_token_ids, reason
):
    """Tokens before the fault are handed over, and a request that ends among them ends well."""
    model = {"speculative_model": "0"} if method == "layers" else {}
    shape = {} if method == "none" else {"speculative_tree": "chain:4"}
    core = engine(tiny_model, speculative_method=method, speculative_adaptive=False, **shape, **model)
    params = replace(DEAD_END, temperature=temperature, stop_token_ids=stop_token_ids)
    error = NO_TOKEN_LEFT if reason == "error" else None
    assert answer(core, AddRequest("r", PROMPT, params)) == ([3, 5], reason, error)
    assert core.scheduler.counters.drafted > 0 or method == "none"
    assert core.scheduler.counters.draft_failures == 0
