"""What is sent is what arrives, and what is usual costs nothing on the wire."""

from __future__ import annotations

from quire.engine.messages import AddRequest, StepOutputs, StepStats, down_decoder, encoder, up_decoder
from quire.scheduler.params import SamplingParams, Speculative
from quire.scheduler.plan import Chunk


def test_a_request_with_its_wishes() -> None:
    params = SamplingParams(max_tokens=3)
    usual = AddRequest("r", [1, 2], params)
    wishful = AddRequest("r", [1, 2], params, speculative=Speculative(method="ngram", num_tokens=0))
    for request in (usual, wishful):
        assert down_decoder.decode(encoder.encode(request)) == request
    assert b"speculative" not in encoder.encode(usual)


def test_a_step_with_what_was_drafted() -> None:
    stats = StepStats(
        draft_seconds=0.25,
        draft_tokens_total=7,
        accepted_tokens_total=4,
        draft_failures_total=1,
        drafted_by_position=[4, 3],
        accepted_by_position=[3, 1],
        draft_depths=[2, 1, 3],
    )
    outputs = StepOutputs([Chunk("r", 0, [5, 6], num_drafted=3, num_accepted=1)], stats)
    assert up_decoder.decode(encoder.encode(outputs)) == outputs
