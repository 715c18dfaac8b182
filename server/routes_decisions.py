"""POST /v1/decisions: typed questions about an input, answered by probabilities from one prefill."""

from __future__ import annotations

from contextlib import aclosing

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..engine.outputs import SampleOutput
from . import errors
from .connection import while_connected
from .decisions import answer_of, decision_request, decision_size
from .generate import Generation
from .json_answer import json_answer
from .protocol import DecisionBody
from .responses.wire import usage_dict
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
    if "abort" in generation.finish_reasons:
        raise errors.aborted()
    tokenizer = state.text.tokenizer

    def answer() -> Response:
        """A call may ask about a hundred thousand options."""
        pairs = zip(body.questions, outputs, strict=True)
        answers = [answer_of(question, output, tokenizer) for question, output in pairs]
        return json_answer({"model": model, "answers": answers, "usage": usage_dict(generation.usage)})

    return await state.in_pool(answer)


async def _outputs(generation: Generation) -> list[SampleOutput]:
    """One for each prompt, in their order."""
    outputs: dict[int, SampleOutput] = {}
    async with aclosing(generation.deltas()) as batches:
        async for batch in batches:
            for delta in batch:
                outputs.setdefault(delta.index, SampleOutput(delta.index)).add(delta)
    return [outputs[index] for index in sorted(outputs)]
