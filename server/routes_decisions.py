"""POST /v1/decisions: typed questions about an input, answered by probabilities from one prefill."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..engine.outputs import SampleOutput
from .connection import while_connected
from .decisions import answer_of, decision_request, decision_size
from .generate import Generation, Usage
from .json_answer import json_answer
from .protocol import DecisionBody
from .routing import GuardedRoute
from .state import state_of

router = APIRouter(route_class=GuardedRoute)


@router.post("/v1/decisions", response_model=None)
async def decisions(body: DecisionBody, request: Request) -> Response:
    state = state_of(request)
    model = state.model_name(body.model)
    body.check_together()
    order = state.order_of(request, body)
    generation = await state.open_generation(
        decision_size(body), order, lambda: decision_request(body, state.text, order)
    )
    with generation:
        generation.start()
        outputs = await while_connected(request.receive, _outputs(generation))
    tokenizer = state.text.tokenizer

    def answer() -> Response:
        """A call may ask about a hundred thousand options."""
        pairs = zip(body.questions, outputs, strict=True)
        answers = [answer_of(question, output, tokenizer) for question, output in pairs]
        return json_answer({"model": model, "answers": answers, "usage": _usage(generation.usage)})

    return await state.in_pool(answer)


async def _outputs(generation: Generation) -> list[SampleOutput]:
    """One for each prompt, in their order."""
    outputs: dict[int, SampleOutput] = {}
    async with aclosing(generation.deltas()) as batches:
        async for batch in batches:
            for delta in batch:
                outputs.setdefault(delta.index, SampleOutput(delta.index)).add(delta)
    return [outputs[index] for index in sorted(outputs)]


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
