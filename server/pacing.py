"""Fewer, larger events: deltas of a sample are held until they bring `interval` tokens (`stream_interval`).

A sample's first token and its end are not held, and nothing is when something fails: what was drawn is sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..engine.outputs import Delta
from . import errors


async def paced(batches: AsyncGenerator[list[Delta]], interval: int) -> AsyncGenerator[list[Delta]]:
    """Batches of the same deltas, joined. An empty one (a sign of life) goes through."""
    held: dict[int, Delta] = {}
    begun: set[int] = set()
    try:
        async with aclosing(batches):
            async for batch in batches:
                ready = [news for delta in batch if (news := _push(held, begun, delta, interval)) is not None]
                if ready or not batch:
                    yield ready
    except errors.ApiError:
        if held:
            yield list(held.values())
        raise


def _push(held: dict[int, Delta], begun: set[int], delta: Delta, interval: int) -> Delta | None:
    """What is to be sent of the delta's sample now; None = it waits."""
    waiting = held.pop(delta.index, None)
    news = delta if waiting is None else _joined(waiting, delta)
    if news.finish_reason is None and delta.index in begun and news.num_drawn < interval:
        held[delta.index] = news
        return None
    begun.add(delta.index)
    return news


def _joined(first: Delta, then: Delta) -> Delta:
    both = None if first.logprobs is None and then.logprobs is None else (first.logprobs or []) + (then.logprobs or [])
    return Delta(
        index=then.index,
        text=first.text + then.text,
        token_ids=first.token_ids + then.token_ids,
        num_drawn=first.num_drawn + then.num_drawn,
        num_drafted=first.num_drafted + then.num_drafted,
        num_accepted=first.num_accepted + then.num_accepted,
        offsets=first.offsets + then.offsets,
        logprobs=both,
        finish_reason=then.finish_reason,
        stop_reason=then.stop_reason,
        error=then.error,
    )
